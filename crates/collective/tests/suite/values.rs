//! Values that every rank can predict.

/// The documented order, one element at a time.
pub fn tree_sum(x: &[f32]) -> f32 {
    match x {
        [one] => *one,
        _ => {
            let half = (0..).map(|k| 1 << k).take_while(|h| *h < x.len()).last().expect("two or more");
            tree_sum(&x[..half]) + tree_sum(&x[half..])
        }
    }
}

/// A well-mixed function of `words` (splitmix64's finaliser after each).
pub fn hash(words: &[u64]) -> u64 {
    words.iter().fold(0, |state: u64, word| {
        let mut z = (state ^ word).wrapping_add(0x9e37_79b9_7f4a_7c15);
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    })
}

/// Elements of both signs over eight orders of magnitude, so that the order of a sum shows.
pub fn elements(seed: u64, rank: usize, length: usize) -> Vec<f32> {
    let element = |i| {
        let z = hash(&[seed, rank as u64, i]);
        ((z >> 32) as i32 as f32) * 10f32.powi((z % 9) as i32 - 4)
    };
    (0..length as u64).map(element).collect()
}

/// Bytes that differ between seeds and ranks.
pub fn bytes(seed: u64, rank: usize, length: usize) -> Vec<u8> {
    (0..length as u64).map(|i| hash(&[seed, rank as u64, i]) as u8).collect()
}

/// The sum over all ranks of `elements(seed, rank, length)`, as bits.
pub fn reduced(seed: u64, world_size: usize, length: usize) -> Vec<u32> {
    let inputs: Vec<_> = (0..world_size).map(|rank| elements(seed, rank, length)).collect();
    (0..length).map(|i| tree_sum(&inputs.iter().map(|x| x[i]).collect::<Vec<_>>()).to_bits()).collect()
}

/// Equal exactly if every bit is.
pub fn bits(x: &[f32]) -> Vec<u32> {
    x.iter().map(|x| x.to_bits()).collect()
}
