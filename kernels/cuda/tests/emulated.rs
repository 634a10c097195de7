//! Every kernel on the CPU: the .cu files compiled as C++ after `emulated/emulate.h`, under the sanitizers, each against
//! a plain reference in double precision.

use std::path::Path;
use std::process::Command;

/// The C++ compiler: `CXX`, or `c++`.
fn compiler() -> String {
    std::env::var("CXX").unwrap_or_else(|_| "c++".to_owned())
}

const OPTIONS: &[&str] = &[
    "-std=c++17",
    "-O1",
    "-g1",
    "-Wall",
    "-Wextra",
    "-Werror",
    "-Wno-unknown-pragmas",
    "-ffp-contract=off",
    "-fno-strict-aliasing",
    "-fsanitize=address,undefined",
    "-fno-sanitize-recover=all",
];

/// Compiles `emulated/<name>.cpp` and runs it.
fn run(name: &str) {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/emulated");
    let program =
        Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("emulated-{name}-{}", std::process::id()));
    let compile = Command::new(compiler())
        .args(OPTIONS)
        .arg("-o")
        .arg(&program)
        .arg(folder.join(format!("{name}.cpp")))
        .output()
        .unwrap_or_else(|e| {
            panic!(
                "{} cannot be started ({e}): a C++ compiler is needed; on Debian: apt install g++",
                compiler()
            )
        });
    assert!(compile.status.success(), "{name}.cpp:\n{}", String::from_utf8_lossy(&compile.stderr));
    let ran = Command::new(&program).output().expect("the program was just made");
    std::fs::remove_file(&program).expect("our own file");
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    assert!(ran.status.success(), "{}\n{}", text(&ran.stdout), text(&ran.stderr));
    assert!(text(&ran.stdout).contains("ok "), "{name} checked nothing");
}

macro_rules! emulated {
    ($($name:ident)*) => {$(
        #[test]
        fn $name() {
            run(stringify!($name));
        }
    )*};
}

emulated! {
    attention
    attention_paged
    dense
    elementwise
    emulator
    optimizer
    quantized
    rms_norm
    sampling
}
