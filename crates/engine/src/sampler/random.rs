//! Counter-based random numbers: the draw at a position needs no state from the draws before it.

/// The uniform number of `position` under `seed`, in `[0, 1)` with 53 random bits.
pub fn uniform(seed: u64, position: u64) -> f64 {
    let bits = mix(mix(seed).wrapping_add(position));
    (bits >> 11) as f64 * (1.0 / (1u64 << 53) as f64)
}

/// One step of SplitMix64 (Steele, Lea & Flood, OOPSLA 2014): a bijection that scatters neighbours.
fn mix(state: u64) -> u64 {
    let z = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

#[cfg(test)]
mod tests {
    use super::uniform;

    /// Pearson's statistic of `draws` over 64 cells; 63 degrees of freedom.
    fn chi_square(draws: impl Iterator<Item = f64>) -> f64 {
        let (mut counts, mut n) = ([0f64; 64], 0.0);
        draws.for_each(|u| {
            counts[(u * 64.0) as usize] += 1.0;
            n += 1.0;
        });
        counts.iter().map(|c| (c - n / 64.0).powi(2) / (n / 64.0)).sum()
    }

    #[test]
    fn draws_are_uniform_along_positions_and_along_seeds() {
        // The 99.9% point of chi² with 63 degrees of freedom is 103.4; the draws are fixed.
        assert!(chi_square((0..64_000).map(|p| uniform(0, p))) < 103.4);
        assert!(chi_square((0..64_000).map(|s| uniform(s, 7))) < 103.4);
        assert!(chi_square((0..64_000).map(|i| uniform(i % 250, i / 250))) < 103.4);
    }

    #[test]
    fn neighbouring_draws_are_independent() {
        let product = |p| (uniform(3, p) - 0.5) * (uniform(3, p + 1) - 0.5);
        let correlation = (0..64_000).map(product).sum::<f64>() / 64_000.0 * 12.0;
        assert!(correlation.abs() < 0.015, "{correlation}");
        assert!((0..64_000).all(|p| (0.0..1.0).contains(&uniform(9, p))));
    }
}
