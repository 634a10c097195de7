use super::*;
use crate::cpu::gemm::gemm;
use crate::cpu::pages::Loan;
use crate::cpu::quant::tests::random_blocks;

fn values(n: usize, seed: u32) -> Vec<f32> {
    let mut s = seed;
    (0..n)
        .map(|_| {
            s = s.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (s >> 8) as f32 / (1 << 23) as f32 - 1.0
        })
        .collect()
}

fn rows_of(matrix: &PackedMatrix) -> Vec<f32> {
    let mut out = vec![0.0; matrix.rows() * matrix.columns()];
    for (i, row) in out.chunks_exact_mut(matrix.columns()).enumerate() {
        matrix.read_row(i, row);
    }
    out
}

fn every_format(rows: usize, columns: usize) -> Vec<(&'static str, PackedMatrix)> {
    let dense = values(rows * columns, 9);
    let halves: Vec<u8> = dense.iter().flat_map(|v| f16::from_f32(*v).to_le_bytes()).collect();
    let brains: Vec<u8> = dense.iter().flat_map(|v| bf16::from_f32(*v).to_le_bytes()).collect();
    let of =
        |format, bytes: &[u8]| (format, PackedMatrix::from_format(rows, columns, format, bytes).unwrap());
    let mut all =
        vec![("f32", PackedMatrix::from_f32(rows, columns, &dense)), of("f16", &halves), of("bf16", &brains)];
    all.extend(
        format::FORMATS.iter().zip(1..).map(|(f, seed)| of(f.name, &random_blocks(f, rows, columns, seed))),
    );
    all
}

#[test]
fn panels_that_lie_elsewhere_are_the_same_matrix() {
    let (rows, columns) = (37, 512);
    for (format, matrix) in every_format(rows, columns) {
        let mut memory = Piece::alone(matrix.bytes() + LINE);
        memory[LINE..].copy_from_slice(matrix.image());
        let owner = Arc::new(memory);
        let image = |range| Image::Lent(Loan::new(owner.clone(), range).unwrap());
        let len = owner.len();
        let there = PackedMatrix::from_image(rows, columns, format, image(LINE..len)).unwrap();
        let x = values(3 * columns, 5);
        for activations in [Activations::F32, Activations::Int8] {
            let product = |m: PackedMatrix| {
                let mut y = vec![0.0; 3 * rows];
                m.with_activations(activations).multiply(&x, &mut y);
                y
            };
            let again = PackedMatrix::from_format(rows, columns, format, &there.unpack()).unwrap();
            let lent = PackedMatrix::from_image(rows, columns, format, image(LINE..len)).unwrap();
            assert_eq!(product(lent), product(again), "{format}");
        }
        assert_eq!(rows_of(&there), rows_of(&matrix), "{format}");
        assert!(PackedMatrix::from_image(rows, columns, format, image(0..len)).is_none(), "{format}");
        assert!(PackedMatrix::from_image(rows, columns, format, image(1..len - LINE + 1)).is_none());
    }
}

#[test]
fn products_equal_the_dense_product_bit_for_bit_in_every_format_and_row_count() {
    let (rows, columns) = (150, 512);
    for (format, matrix) in every_format(rows, columns) {
        let w = rows_of(&matrix);
        for m in [1, 2, 3, 4, 5, 6, 7, 8, 13] {
            let x = values(m * columns, m as u32);
            let (mut got, mut want) = (vec![1.0; m * rows], vec![0.0; m * rows]);
            matrix.multiply(&x, &mut got);
            let a = View::rows(Elems::F32(&x), columns);
            gemm(m, rows, columns, a, View::transposed(Elems::F32(&w), columns), &mut want, false);
            assert_eq!(got, want, "{format}, {m} rows");
        }
    }
}

#[test]
fn backward_products_equal_the_dense_ones_bit_for_bit() {
    let (rows, columns, m) = (1030, 256, 5);
    for (format, matrix) in every_format(rows, columns) {
        let (w, dy) = (rows_of(&matrix), values(m * rows, 77));
        let (mut got, mut want) = (vec![0.0; m * columns], vec![0.0; m * columns]);
        matrix.multiply_transposed(&dy, &mut got);
        let a = View::rows(Elems::F32(&dy), rows);
        gemm(m, columns, rows, a, View::rows(Elems::F32(&w), columns), &mut want, false);
        assert_eq!(got, want, "{format}");
    }
}

#[test]
fn integer_products_do_not_depend_on_the_rows_beside_them_and_stay_near_the_exact_ones() {
    let (rows, columns, m) = (150, 512, 40);
    let x = values(m * columns, 5);
    for (format, matrix) in every_format(rows, columns) {
        let (mut exact, mut all) = (vec![0.0; m * rows], vec![0.0; m * rows]);
        matrix.multiply(&x, &mut exact);
        let matrix = matrix.with_activations(Activations::Int8);
        matrix.multiply(&x, &mut all);
        for (x, all) in x.chunks_exact(columns).zip(all.chunks_exact(rows)) {
            let mut one = vec![0.0; rows];
            matrix.multiply(x, &mut one);
            assert_eq!(one, all, "{format}");
        }
        let norm = |x: &mut dyn Iterator<Item = f32>| x.map(|v| f64::from(v).powi(2)).sum::<f64>().sqrt();
        let error = norm(&mut all.iter().zip(&exact).map(|(a, b)| a - b));
        assert!(error <= 0.01 * norm(&mut exact.iter().copied()), "{format}: {error}");
    }
}

#[test]
fn odd_widths_and_short_buffers_are_refused() {
    assert!(PackedMatrix::from_format(2, 33, "q8_0", &[0; 70]).is_none());
    assert!(PackedMatrix::from_format(2, 32, "q8_0", &[0; 67]).is_none());
    assert!(PackedMatrix::from_format(2, 32, "q2_k", &[0; 70]).is_none());
}

#[test]
fn predicted_bytes_are_held_bytes() {
    for (format, matrix) in every_format(150, 512) {
        assert_eq!(PackedMatrix::bytes_for(150, 512, format), matrix.bytes(), "{format}");
    }
}
