//! Counter-based random numbers: a draw depends on its key and index alone, so there is no state to save, and any
//! rank, order or resumed run draws the same.

/// A stream's key from any words that name it.
pub(crate) fn key(words: &[u64]) -> u64 {
    words.iter().fold(0x9e37_79b9_7f4a_7c15, |state, word| mix(state ^ mix(word.wrapping_add(state))))
}

/// A name as a word for [`key`] (FNV-1a).
pub(crate) fn word(name: &str) -> u64 {
    name.bytes().fold(0xcbf2_9ce4_8422_2325, |hash, byte| (hash ^ byte as u64).wrapping_mul(0x0100_0000_01b3))
}

/// The draw number `index` of stream `key`, uniform in `[0, 1)` with 24 bits.
pub(crate) fn uniform(key: u64, index: u64) -> f32 {
    let bits = mix(key.wrapping_add(index.wrapping_add(1).wrapping_mul(0x9e37_79b9_7f4a_7c15)));
    (bits >> 40) as f32 / (1u32 << 24) as f32
}

/// SplitMix64's finaliser.
fn mix(mut x: u64) -> u64 {
    x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn draws_are_uniform_and_streams_differ() {
        let draws = |seed| (0..10_000).map(|i| uniform(key(&[seed, word("a")]), i)).collect::<Vec<_>>();
        let (a, b) = (draws(0), draws(1));
        let mean = a.iter().sum::<f32>() / a.len() as f32;
        let square = a.iter().map(|x| (x - 0.5).powi(2)).sum::<f32>() / a.len() as f32;
        assert!((mean - 0.5).abs() < 0.02 && (square - 1.0 / 12.0).abs() < 0.005, "{mean} {square}");
        assert!(a.iter().all(|x| (0.0..1.0).contains(x)));
        let together = a.iter().zip(&b).map(|(a, b)| (a - 0.5) * (b - 0.5)).sum::<f32>() / a.len() as f32;
        assert!(together.abs() < 0.005, "{together}");
    }
}
