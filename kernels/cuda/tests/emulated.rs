//! Every kernel on the CPU: the .cu files compiled as C++ after `emulated/emulate.h`, under the sanitizers, each against
//! a plain reference in double precision.

use std::hash::{DefaultHasher, Hash, Hasher};
use std::path::{Path, PathBuf};
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
    // The address sanitizer finds these by itself; their checks double the time to compile.
    "-fno-sanitize=null,object-size,vptr,return,unreachable,nonnull-attribute,returns-nonnull-attribute",
];

/// Compiles `emulated/<name>.cpp` and runs it.
fn run(name: &str) {
    let ran = Command::new(program(name)).output().expect("the program was just made");
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    assert!(ran.status.success(), "{}\n{}", text(&ran.stdout), text(&ran.stderr));
    assert!(text(&ran.stdout).contains("ok "), "{name} checked nothing");
}

/// The program of `emulated/<name>.cpp`, compiled unless one of exactly these sources is there already.
fn program(name: &str) -> PathBuf {
    let kernels = Path::new(env!("CARGO_MANIFEST_DIR"));
    let folder = kernels.join("tests/emulated");
    let target = Path::new(env!("CARGO_TARGET_TMPDIR"));
    let sources = hash(&[kernels, &folder]);
    let program = target.join(format!("emulated-{name}-{sources:016x}"));
    if program.is_file() {
        return program;
    }
    let fresh = target.join(format!("emulated-{name}-{}", std::process::id()));
    let compile = Command::new(compiler())
        .args(OPTIONS)
        .arg("-o")
        .arg(&fresh)
        .arg(folder.join(format!("{name}.cpp")))
        .output()
        .unwrap_or_else(|e| {
            panic!(
                "{} cannot be started ({e}): a C++ compiler is needed; on Debian: apt install g++",
                compiler()
            )
        });
    assert!(compile.status.success(), "{name}.cpp:\n{}", String::from_utf8_lossy(&compile.stderr));
    for old in std::fs::read_dir(target).expect("cargo made it").flatten() {
        if old.file_name().to_string_lossy().starts_with(&format!("emulated-{name}-")) && old.path() != fresh
        {
            let _ = std::fs::remove_file(old.path());
        }
    }
    std::fs::rename(&fresh, &program).expect("within one folder");
    program
}

/// Of every C++ file in these folders, the compiler's name and its options.
fn hash(folders: &[&Path]) -> u64 {
    let mut hasher = DefaultHasher::new();
    (compiler(), OPTIONS).hash(&mut hasher);
    for folder in folders {
        let entries = std::fs::read_dir(folder).expect("a folder of this crate").flatten();
        let mut files: Vec<PathBuf> = entries.map(|e| e.path()).filter(|p| p.is_file()).collect();
        files.sort();
        for file in files {
            (file.file_name(), std::fs::read(&file).expect("a file of this crate")).hash(&mut hasher);
        }
    }
    hasher.finish()
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
