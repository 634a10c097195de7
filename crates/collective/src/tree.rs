//! Sums in the fixed tree that [`ProcessGroup`](crate::ProcessGroup) documents.

/// Elements summed at a time, so that partial sums stay in the first-level cache. Elements are independent: the size
/// changes no result.
const BLOCK: usize = 2048;

/// `out = Σ parts`, elementwise; at least one part, each as long as `out`.
pub fn sum(parts: &[&[f32]], out: &mut [f32]) {
    let levels = parts.len().next_power_of_two().ilog2() as usize;
    let mut scratch = vec![0.0; levels * BLOCK.min(out.len())];
    for (block, out) in out.chunks_mut(BLOCK).enumerate() {
        sum_block(parts, block * BLOCK, out, &mut scratch);
    }
}

/// Sums `out.len()` elements from `start` on; `scratch` holds a block for each level below this one.
fn sum_block(parts: &[&[f32]], start: usize, out: &mut [f32], scratch: &mut [f32]) {
    if let [one] = parts {
        return out.copy_from_slice(&one[start..start + out.len()]);
    }
    let (left, right) = parts.split_at(parts.len().next_power_of_two() / 2);
    let (right_sum, scratch) = scratch.split_at_mut(out.len());
    sum_block(left, start, out, scratch);
    sum_block(right, start, right_sum, scratch);
    for (a, b) in out.iter_mut().zip(&*right_sum) {
        *a += b;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Values whose sum depends on the order of addition.
    fn parts(count: usize, length: usize) -> Vec<Vec<f32>> {
        let value =
            |i: usize, j: usize| ((i * 7919 + j * 104_729) % 1000) as f32 * 10f32.powi((i % 7) as i32 - 3);
        (0..count).map(|i| (0..length).map(|j| value(i, j)).collect()).collect()
    }

    fn sum_of(parts: &[Vec<f32>]) -> Vec<f32> {
        let mut out = vec![f32::NAN; parts[0].len()];
        sum(&parts.iter().map(Vec::as_slice).collect::<Vec<_>>(), &mut out);
        out
    }

    #[test]
    fn ranks_that_hold_a_power_of_two_of_terms_each_continue_the_tree() {
        for ranks in 1..9 {
            for terms in [1, 2, 4, 8] {
                let all = parts(ranks * terms, 33);
                let by_rank: Vec<_> = all.chunks(terms).map(sum_of).collect();
                assert_eq!(sum_of(&by_rank), sum_of(&all), "{ranks} ranks of {terms} terms");
            }
        }
    }

    #[test]
    fn blocks_change_no_bit() {
        let all = parts(5, 2 * BLOCK + 3);
        let sums = sum_of(&all);
        for at in [0, 1, BLOCK - 1, BLOCK, 2 * BLOCK + 2] {
            let one: Vec<_> = all.iter().map(|part| vec![part[at]]).collect();
            assert_eq!(sum_of(&one)[0].to_bits(), sums[at].to_bits(), "element {at}");
        }
    }

    #[test]
    fn no_zero_is_added() {
        let negative_zero = vec![vec![-0.0f32]; 3];
        assert!(sum_of(&negative_zero)[0].is_sign_negative());
    }
}
