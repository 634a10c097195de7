use super::super::pages::Loan;
use super::format::FORMATS;
use super::*;

fn noise(n: usize, seed: u32) -> impl Iterator<Item = u32> {
    let mut s = seed;
    (0..n).map(move |_| {
        s = s.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        s >> 8
    })
}

/// File blocks of random bytes whose halves are small finite numbers.
pub(crate) fn random_blocks(format: &QuantFormat, rows: usize, columns: usize, seed: u32) -> Vec<u8> {
    let count = rows * columns / format.block;
    let mut bytes: Vec<u8> = noise(count * format.block_bytes, seed).map(|v| v as u8).collect();
    for (i, block) in bytes.chunks_exact_mut(format.block_bytes).enumerate() {
        let mut half = |at: usize, v: f32| block[at..at + 2].copy_from_slice(&f16::from_f32(v).to_le_bytes());
        let at = if format.name == "q6_k" { 208 } else { 0 };
        half(at, 0.011 + (i % 7) as f32 * 0.003);
        if format.scales.has_minimum() {
            half(2, (i % 5) as f32 * 0.02 - 0.05);
        }
    }
    bytes
}

fn rows_of(x: usize, columns: usize) -> Int8Rows {
    let values: Vec<f32> = noise(x * columns, 77).map(|v| v as f32 / (1 << 23) as f32 - 1.0).collect();
    Int8Rows::quantize(&values, columns)
}

fn products(
    panels: &QuantPanels,
    x: &Int8Rows,
    multiply: impl Fn(Panel, &Int8Rows, Range<usize>, &mut product::Put),
) -> Vec<Vec<f32>> {
    let shape = Shape { format: panels.format, columns: panels.columns };
    let count = panels.bytes() / shape.panel_bytes();
    let mut y = vec![vec![0.0; count * LANES]; x.rows];
    for p in 0..count {
        multiply(panels.panel(p), x, 0..x.rows, &mut |row, sums| {
            y[row][p * LANES..][..LANES].copy_from_slice(sums)
        });
    }
    y
}

#[test]
fn panels_hold_what_the_file_says() {
    for format in FORMATS {
        let (rows, columns) = (21, 512);
        let bytes = random_blocks(format, rows, columns, 1);
        let panels = QuantPanels::pack(format, rows, columns, &bytes, None).unwrap();
        assert_eq!(QuantPanels::bytes_for(format, rows, columns), Some(panels.bytes()), "{}", format.name);
        for row in 0..rows {
            let panel = panels.panel(row / LANES);
            for b in 0..columns / BLOCK {
                let per = format.block / BLOCK;
                let at = (row * columns / format.block + b / per) * format.block_bytes;
                let content = (format.read)(&bytes[at..][..format.block_bytes], b % per);
                let codes: Vec<u8> = (0..BLOCK).map(|i| panel.code(b, row % LANES, i)).collect();
                assert_eq!(codes, content.codes, "{}, row {row}, block {b}", format.name);
            }
        }
    }
}

#[test]
fn panels_give_the_file_back_byte_for_byte() {
    for format in FORMATS {
        let (rows, columns) = (21, 512);
        let bytes: Vec<u8> = noise(rows * format.row_bytes(columns).unwrap(), 9).map(|v| v as u8).collect();
        let panels = QuantPanels::pack(format, rows, columns, &bytes, None).unwrap();
        assert!(panels.unpack(rows) == bytes, "{}", format.name);
        let image = |len: usize| Image::Lent(Loan::new(Arc::new(panels.image().to_vec()), 0..len).unwrap());
        let len = panels.bytes();
        let again = QuantPanels::from_image(format, rows, columns, image(len)).unwrap();
        assert!(again.unpack(rows) == bytes, "{}", format.name);
        assert!(QuantPanels::from_image(format, rows, columns, image(len - 64)).is_none());
    }
}

#[test]
fn every_instruction_set_gives_the_bits_of_the_reference() {
    for format in FORMATS {
        let (rows, columns) = (37, 768);
        let panels =
            QuantPanels::pack(format, rows, columns, &random_blocks(format, rows, columns, 2), None).unwrap();
        for m in [1, 2, 3, 4, 5, 7, 8, 9, 16, 19] {
            let x = rows_of(m, columns);
            let want = products(&panels, &x, product::portable);
            assert_eq!(products(&panels, &x, product::multiply), want, "{}, {m} rows", format.name);
            #[cfg(target_arch = "x86_64")]
            {
                if crate::cpu::simd::avx2() {
                    assert_eq!(
                        products(&panels, &x, avx2::multiply),
                        want,
                        "{}, {m} rows, avx2",
                        format.name
                    );
                }
                if avx512::available() {
                    assert_eq!(
                        products(&panels, &x, avx512::multiply),
                        want,
                        "{}, {m} rows, avx512",
                        format.name
                    );
                }
            }
        }
    }
}

#[test]
fn extreme_codes_and_activations_do_not_overflow() {
    for format in FORMATS {
        let (rows, columns) = (16, 256);
        for fill in [0, 0xff] {
            let mut bytes = vec![fill; columns * rows / format.block * format.block_bytes];
            for block in bytes.chunks_exact_mut(format.block_bytes) {
                let at = if format.name == "q6_k" { 208 } else { 0 };
                block[at..at + 2].copy_from_slice(&f16::ONE.to_le_bytes());
                if format.scales.has_minimum() {
                    block[2..4].copy_from_slice(&f16::ONE.to_le_bytes());
                }
            }
            let panels = QuantPanels::pack(format, rows, columns, &bytes, None).unwrap();
            for sign in [1.0, -1.0] {
                let x = Int8Rows::quantize(&vec![sign; 3 * columns], columns);
                let want = products(&panels, &x, product::portable);
                assert_eq!(products(&panels, &x, product::multiply), want, "{} {fill}", format.name);
                #[cfg(target_arch = "x86_64")]
                if crate::cpu::simd::avx2() {
                    assert_eq!(products(&panels, &x, avx2::multiply), want, "{} {fill} avx2", format.name);
                }
            }
        }
    }
}

#[test]
fn integer_products_are_the_products_of_the_decoded_numbers() {
    for format in FORMATS {
        let (rows, columns) = (16, 512);
        let panels =
            QuantPanels::pack(format, rows, columns, &random_blocks(format, rows, columns, 3), None).unwrap();
        let x = rows_of(2, columns);
        let mut w = vec![0.0; columns * LANES];
        panels.decode(0, 0, &mut w);
        for (row, got) in products(&panels, &x, product::multiply).iter().enumerate() {
            for lane in 0..LANES {
                let term = |i: usize| {
                    let scale = f64::from(x.scales[row * x.blocks + i / 32]);
                    f64::from(w[i * LANES + lane]) * scale * f64::from(x.quants[row * columns + i])
                };
                let want: f64 = (0..columns).map(term).sum();
                let magnitude: f64 = (0..columns).map(|i| term(i).abs()).sum();
                let error = (f64::from(got[lane]) - want).abs();
                assert!(error <= 3e-6 * magnitude, "{}: {} for {want}", format.name, got[lane]);
            }
        }
    }
}

#[test]
fn decoding_gives_the_bits_of_the_reference_in_every_instruction_set() {
    for format in FORMATS {
        let (rows, columns) = (16, 512);
        let panels =
            QuantPanels::pack(format, rows, columns, &random_blocks(format, rows, columns, 4), None).unwrap();
        for b in 0..columns / BLOCK {
            let (mut got, mut want) = ([0.0; BLOCK * LANES], [1.0; BLOCK * LANES]);
            strips::decode(panels.panel(0), b, &mut got);
            strips::portable(panels.panel(0), b, &mut want);
            let bits = |x: &[f32]| x.iter().map(|v| v.to_bits()).collect::<Vec<_>>();
            assert_eq!(bits(&got), bits(&want), "{}, block {b}", format.name);
        }
    }
}

#[test]
fn odd_widths_and_wrong_lengths_are_refused() {
    let q8 = format::by_name("q8_0").unwrap();
    assert!(QuantPanels::pack(q8, 2, 33, &[0; 70], None).is_none());
    assert!(QuantPanels::pack(q8, 2, 32, &[0; 67], None).is_none());
    assert!(QuantPanels::pack(format::by_name("q6_k").unwrap(), 1, 32, &[0; 210], None).is_none());
    assert!(format::by_name("q2_k").is_none());
}
