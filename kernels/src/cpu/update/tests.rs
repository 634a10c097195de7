//! Every path against the plain reference.

use super::*;
use crate::cpu::adamw::AdamWRule;
use crate::cpu::lion::LionRule;
use crate::cpu::sgd::SgdRule;
use proptest::prelude::*;

const ADAMW: AdamWRule = AdamWRule {
    keep: 0.999,
    one_minus_beta1: 0.1,
    beta2: 0.95,
    one_minus_beta2: 0.05,
    step_size: 1e-2,
    root_correction2: 0.3,
    eps: 1e-8,
    gradient_scale: 0.7,
};
const SGD: SgdRule = SgdRule { weight_decay: 0.01, momentum: 0.9, lr: 1e-2, gradient_scale: 0.7 };
const LION: LionRule = LionRule {
    keep: 0.999,
    beta1: 0.9,
    one_minus_beta1: 0.1,
    beta2: 0.99,
    one_minus_beta2: 0.01,
    lr: 1e-3,
    gradient_scale: 0.7,
};

/// Everything a span borrows, at an offset that misaligns it.
#[derive(Clone)]
struct Buffers {
    offset: usize,
    master: Vec<f32>,
    wide: [Vec<f32>; 2],
    narrow: [Vec<bf16>; 2],
    gradient: Vec<f32>,
    copies: (Vec<f32>, Vec<bf16>, Vec<f16>),
}

impl Buffers {
    fn new(seed: u32, len: usize, offset: usize) -> Self {
        let len = len + offset;
        let mut s = seed;
        let mut values = |least: f32| -> Vec<f32> {
            (0..len)
                .map(|_| {
                    s = s.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                    ((s >> 8) as f32 / (1 << 23) as f32 - 1.0).max(least)
                })
                .collect()
        };
        let wide = [values(-1.0), values(0.0)];
        let narrow = wide.each_ref().map(|w| w.iter().map(|x| bf16::from_f32(*x)).collect());
        let copies = (vec![0.0; len], vec![bf16::ZERO; len], vec![f16::ZERO; len]);
        Self { offset, master: values(-1.0), wide, narrow, gradient: values(-1.0), copies }
    }

    /// A span with `dtypes.len()` states, bf16 where true, and copy number `copy`.
    fn span(&mut self, dtypes: &[bool], copy: usize) -> Span<'_> {
        let from = self.offset;
        let states = self.wide.iter_mut().zip(&mut self.narrow).zip(dtypes);
        Span {
            master: &mut self.master[from..],
            states: states
                .map(|((wide, narrow), bf16)| match bf16 {
                    false => Values::F32(&mut wide[from..]),
                    true => Values::Bf16(&mut narrow[from..]),
                })
                .collect(),
            gradient: &self.gradient[from..],
            copy: match copy {
                0 => None,
                1 => Some(CopyOut::F32(&mut self.copies.0[from..])),
                2 => Some(CopyOut::Bf16(&mut self.copies.1[from..])),
                3 => Some(CopyOut::High(&mut self.copies.1[from..])),
                _ => Some(CopyOut::F16(&mut self.copies.2[from..])),
            },
        }
    }

    fn bits(&self) -> (Vec<u32>, Vec<u16>) {
        let wide = [&self.master, &self.wide[0], &self.wide[1], &self.copies.0];
        let wide = wide.iter().flat_map(|x| x.iter().map(|v| v.to_bits())).collect();
        let narrow = [&self.narrow[0], &self.narrow[1], &self.copies.1];
        let narrow = narrow.iter().flat_map(|x| x.iter().map(|v| v.to_bits()));
        (wide, narrow.chain(self.copies.2.iter().map(|v| v.to_bits())).collect())
    }
}

fn check<R: Rule>(rule: R, fast: fn(R, Span), dtypes: &[bool], copy: usize, buffers: &Buffers) {
    let (mut a, mut b) = (buffers.clone(), buffers.clone());
    for _ in 0..3 {
        fast(rule, a.span(dtypes, copy));
        apply_scalar(rule, b.span(dtypes, copy));
    }
    assert_eq!(a.bits(), b.bits(), "states {dtypes:?}, copy {copy}");
}

/// Masters in two halves beside masters in one piece.
fn check_halved<R: Rule>(rule: R, dtypes: &[bool], buffers: &Buffers) {
    let (mut whole, mut halved) = (buffers.clone(), buffers.clone());
    let mut low = vec![0; buffers.master.len()];
    split_block(&halved.master, &mut halved.copies.1, &mut low);
    for _ in 0..3 {
        apply_scalar(rule, whole.span(dtypes, 3));
        let mut high = std::mem::take(&mut halved.copies.1);
        let Span { states, gradient, .. } = halved.span(dtypes, 0);
        let from = buffers.offset;
        apply_halved(rule, HalvedSpan { high: &mut high[from..], low: &mut low[from..], states, gradient });
        halved.copies.1 = high;
    }
    join_block(&halved.copies.1, &low, &mut halved.master);
    let from = buffers.offset;
    whole.copies.1[..from].copy_from_slice(&halved.copies.1[..from]);
    assert_eq!(whole.bits(), halved.bits(), "states {dtypes:?}");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]
    #[test]
    fn every_path_equals_the_scalar_reference_bit_for_bit(
        seed: u32,
        len in prop_oneof![0..70usize, CHUNK - 3..CHUNK + 3, Just(2 * CHUNK + 11)],
        offset in 0..9usize,
    ) {
        let buffers = Buffers::new(seed, len, offset);
        for copy in 0..5 {
            for bf16 in [false, true] {
                check(ADAMW, apply_two, &[bf16, bf16], copy, &buffers);
                check(ADAMW, apply_two, &[bf16, !bf16], copy, &buffers);
                check(SGD, apply_one, &[bf16], copy, &buffers);
                check(LION, apply_one, &[bf16], copy, &buffers);
            }
            check(SGD, apply_stateless, &[], copy, &buffers);
        }
        check_halved(ADAMW, &[false, true], &buffers);
        check_halved(LION, &[true], &buffers);
        check_halved(SGD, &[], &buffers);
    }
}

#[test]
fn states_in_8_bits_are_f32_states_rounded_after_every_update() {
    let buffers = Buffers::new(11, 2 * CHUNK + 3 * BLOCK + 77, 0);
    let len = buffers.master.len();
    let (mut held, mut plain) = (buffers.clone(), buffers.clone());
    let mut codes = [vec![0u8; len], vec![0u8; len]];
    let mut exponents = [vec![0i8; len.div_ceil(64)], vec![0i8; len.div_ceil(64)]];
    plain.wide.iter_mut().for_each(|x| x.fill(0.0));
    for step in 0..3 {
        let draws = |at: u64| Draws { key: 2 * step + at, first: 128 };
        let [mut m, mut v] =
            std::array::from_fn(|_| EightBits { codes: &mut [], exponents: &mut [], signed: true });
        for (at, (view, (codes, exponents))) in
            [&mut m, &mut v].into_iter().zip(codes.iter_mut().zip(&mut exponents)).enumerate()
        {
            *view = EightBits { codes, exponents, signed: at == 0 };
        }
        let Span { master, gradient, .. } = held.span(&[], 0);
        let states = vec![Values::F8(m, draws(0)), Values::F8(v, draws(1))];
        apply_two(ADAMW, Span { master, states, gradient, copy: None });
        apply_scalar(ADAMW, plain.span(&[false, false], 0));
        for (at, wide) in plain.wide.iter_mut().enumerate() {
            let (mut codes, mut exponents) = (vec![0; len], vec![0; len.div_ceil(64)]);
            let mut view = EightBits { codes: &mut codes, exponents: &mut exponents, signed: at == 0 };
            view.write(0, wide, Some(draws(at as u64)));
            view.read(0, wide);
        }
    }
    assert!(held.master.iter().zip(&plain.master).all(|(a, b)| a.to_bits() == b.to_bits()));
}

#[test]
fn a_copy_past_the_caches_is_the_same_copy() {
    for offset in [0, 1, 7] {
        let buffers = Buffers::new(3, STREAMED + 37, offset);
        for copy in 0..5 {
            check(ADAMW, apply_two, &[false, true], copy, &buffers);
        }
    }
}

#[test]
#[should_panic(expected = "a slice of another parameter")]
fn slices_of_different_lengths_are_refused() {
    let mut buffers = Buffers::new(1, 20, 0);
    buffers.gradient.pop();
    apply_two(ADAMW, buffers.span(&[false, false], 0));
}
