//! Storage formats: bit-equal to `gguf.quants`, and what every format promises.

use crate::common::{fixture, values};
use hearth_weights::quant::{FORMATS, by_ggml_type, by_name, byte_len, is_writable};

fn floats(bytes: &[u8]) -> Vec<u32> {
    bytes.chunks_exact(4).map(|b| u32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect()
}

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|v| v.to_bits()).collect()
}

#[test]
fn dequantized_values_equal_the_gguf_package_bit_for_bit() {
    for format in FORMATS.iter().filter(|f| f.name() != "f32") {
        let golden = std::fs::read(fixture(&format!("quant/{}.read", format.name()))).unwrap();
        let blocks = golden.len() / (format.block_bytes() + 4 * format.block_len());
        let (bytes, expected) = golden.split_at(blocks * format.block_bytes());
        let mut out = vec![0f32; blocks * format.block_len()];
        format.dequantize(bytes, &mut out);
        assert_eq!(bits(&out), floats(expected), "{}", format.name());
    }
}

#[test]
fn quantized_blocks_equal_the_gguf_package_byte_for_byte() {
    let input = std::fs::read(fixture("quant/values.f32")).unwrap();
    let input: Vec<f32> = floats(&input).into_iter().map(f32::from_bits).collect();
    for format in FORMATS.iter().filter(|f| is_writable(**f)) {
        let golden = std::fs::read(fixture(&format!("quant/{}.write", format.name()))).unwrap();
        let mut out = vec![0u8; input.len() / format.block_len() * format.block_bytes()];
        assert!(format.quantize(&input, &mut out));
        assert_eq!(out, golden, "{}", format.name());
    }
}

#[test]
fn names_and_type_numbers_lead_back_to_their_format() {
    for (i, format) in FORMATS.iter().enumerate() {
        assert_eq!(by_name(format.name()).unwrap().name(), format.name());
        assert_eq!(by_name(&format.name().to_uppercase()).unwrap().name(), format.name());
        assert_eq!(by_ggml_type(format.ggml_type()).unwrap().name(), format.name());
        assert!(FORMATS[..i].iter().all(|f| f.name() != format.name()), "{} is there twice", format.name());
    }
}

#[test]
fn a_mistyped_name_gets_the_nearest_one() {
    let message = by_name("q4-0").err().unwrap().to_string();
    assert!(message.contains("did you mean \"q4_0\""), "{message}");
    let message = by_name("nonsense").err().unwrap().to_string();
    assert!(message.contains("known: f32, f16, bf16, q8_0"), "{message}");
    assert!(!message.contains("did you mean"), "{message}");
}

#[test]
fn every_block_decodes_to_numbers_and_blocks_are_independent() {
    for format in FORMATS {
        let (len, bytes) = (format.block_len(), format.block_bytes());
        let raw: Vec<u8> = (0..bytes * 2).map(|i| (i * 31 % 120) as u8).collect();
        let mut both = vec![f32::NAN; len * 2];
        format.dequantize(&raw, &mut both);
        assert!(both.iter().all(|v| !v.is_nan()), "{}", format.name());
        let mut second = vec![0f32; len];
        format.dequantize(&raw[bytes..], &mut second);
        assert_eq!(bits(&both[len..]), bits(&second), "{}", format.name());
    }
}

#[test]
fn writable_formats_round_to_nearest_within_their_step() {
    let input = values(256, 1);
    for format in FORMATS.iter().filter(|f| is_writable(**f)) {
        let mut bytes = vec![0u8; byte_len(*format, &[256]).unwrap()];
        format.quantize(&input, &mut bytes);
        let mut back = vec![0f32; 256];
        format.dequantize(&bytes, &mut back);
        // Half a step of the widest block, [−1, 1], plus the rounding of the f16 scale.
        let limit = match format.name() {
            "f32" => 0.0,
            "f16" => 0.0005,
            "bf16" => 0.004,
            "q8_0" => 1.0 / 127.0,
            // Extremes of the other sign clip one step early.
            "q4_0" => 0.13,
            "q5_0" => 0.065,
            "q4_1" => 1.0 / 15.0 + 0.002,
            "q5_1" => 1.0 / 31.0 + 0.002,
            other => panic!("no limit for {other}"),
        };
        let worst = input.iter().zip(&back).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
        assert!(worst <= limit, "{}: {worst}", format.name());
    }
}

#[test]
fn sizes_that_are_not_whole_blocks_or_overflow_have_no_length() {
    let q8 = by_name("q8_0").unwrap();
    assert_eq!(byte_len(q8, &[3, 64]), Some(3 * 2 * 34));
    assert_eq!(byte_len(q8, &[64, 3]), None);
    assert_eq!(byte_len(q8, &[usize::MAX, 64]), None);
}
