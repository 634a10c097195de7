//! Which share of the memory bandwidth AdamW reaches: `cargo bench --package hearth-benches --bench adam [PARAMETERS]`.
//! The baseline is a stream with the same reads and writes and next to no arithmetic, alternating with the step.
use hearth_train::optim::{StateDtype, adam_bandwidth};

fn main() {
    let elements = std::env::args().skip(1).find_map(|a| a.parse().ok()).unwrap_or(64 << 20);
    println!("{elements} parameters, {} threads", rayon::current_num_threads());
    for (state, copy) in [
        (StateDtype::F32, true),
        (StateDtype::F32, false),
        (StateDtype::Bf16, true),
        (StateDtype::Bf16, false),
    ] {
        let found = adam_bandwidth(elements, state, copy);
        println!(
            "moments {state:?}, copy {copy}: {} B/parameter, {:.1} GB/s, {:.0}% of a stream's {:.1} GB/s",
            found.bytes_per_parameter,
            found.gb_s,
            100.0 * found.of_peak(),
            found.stream_gb_s
        );
    }
}
