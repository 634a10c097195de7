//! A stand-in for NVIDIA's driver and compiler that runs the kernels on the CPU: what launches kernels is tested from one
//! end to the other on machines without a card.
//!
//! [`library`] compiles `driver.cpp` and every `.cu` file of the folder above into one shared library with the functions
//! of `libcuda.so.1` and `libnvrtc.so`. It is compiled when a test first needs it and kept beside the build. Kernels are
//! found by preprocessing the files, so a new kernel can be launched without a line here.

use std::fs::{self, File};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicUsize, Ordering};

/// Without sanitizers: the library lives in processes that are not built for them. Memory ends at pages that trap. Without
/// unique symbols, which copies of the library would share.
const OPTIONS: &[&str] =
    &["-std=c++17", "-O2", "-fPIC", "-w", "-ffp-contract=off", "-fno-strict-aliasing", "-fno-gnu-unique"];

/// A driver of one's own: faults set in it reach no other test.
pub struct StandIn {
    path: PathBuf,
    library: libloading::Library,
}

impl StandIn {
    /// A fresh one.
    ///
    /// # Panics
    /// Without a C++ compiler, or when a kernel does not compile.
    pub fn new() -> Self {
        static NUMBER: AtomicUsize = AtomicUsize::new(0);
        let made = library();
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let path = made.with_file_name(format!("libstand-in-{}-{number}.so", std::process::id()));
        fs::copy(&made, &path).expect("the build's folder takes a file");
        // SAFETY: our own library, without initialisers that matter.
        let library = unsafe { libloading::Library::new(&path) }.expect("it was just linked");
        Self { path, library }
    }

    /// Its file, for the driver and for the compiler.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Sets a fault or a policy, see `settings` in `driver.cpp`.
    pub fn set(&self, name: &str, value: i64) {
        let name = std::ffi::CString::new(name).expect("no zero byte");
        // SAFETY: the type is that of `stand_in_set` in `driver.cpp`.
        unsafe {
            let set = self
                .library
                .get::<unsafe extern "C" fn(*const std::ffi::c_char, i64)>(b"stand_in_set\0")
                .expect("it has this function");
            set(name.as_ptr(), value);
        }
    }

    /// How often something happened, or how much of it is held: see `stand_in_count`.
    pub fn count(&self, name: &str) -> i64 {
        let name = std::ffi::CString::new(name).expect("no zero byte");
        // SAFETY: the type is that of `stand_in_count` in `driver.cpp`.
        unsafe {
            let count = self
                .library
                .get::<unsafe extern "C" fn(*const std::ffi::c_char) -> i64>(b"stand_in_count\0")
                .expect("it has this function");
            count(name.as_ptr())
        }
    }
}

impl StandIn {
    /// Kernels that were never launched.
    pub fn idle(&self) -> Vec<String> {
        let name = |index: i64| {
            // SAFETY: the type is that of `stand_in_idle` in `driver.cpp`; a name lives as long as the library.
            unsafe {
                let idle = self
                    .library
                    .get::<unsafe extern "C" fn(i64) -> *const std::ffi::c_char>(b"stand_in_idle\0")
                    .expect("it has this function");
                let name = idle(index);
                (!name.is_null()).then(|| std::ffi::CStr::from_ptr(name).to_string_lossy().into_owned())
            }
        };
        (0..).map_while(name).collect()
    }
}

impl Default for StandIn {
    fn default() -> Self {
        Self::new()
    }
}

impl Drop for StandIn {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.path);
    }
}

/// The compiled library, made unless one of exactly these sources is there.
pub fn library() -> PathBuf {
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    let kernels = here.parent().expect("below the kernels");
    let folder = target().join("stand-in");
    fs::create_dir_all(&folder).expect("the build's folder takes a folder");
    let lock = File::create(folder.join("lock")).expect("the build's folder takes a file");
    // Tests run as processes side by side; one of them compiles.
    lock.lock().expect("a file system with locks");
    let library = folder
        .join(format!("libstand-in-{:016x}.so", hash(&[kernels, here, &kernels.join("tests/emulated")])));
    if !library.is_file() {
        build(kernels, here, &folder, &library);
    }
    library
}

/// `target/tmp` of the build that runs: tests lie in `target/<profile>/deps`.
fn target() -> PathBuf {
    let test = std::env::current_exe().expect("a running program has a path");
    test.ancestors().nth(3).expect("target/<profile>/deps/<test>").join("tmp")
}

fn compiler() -> String {
    std::env::var("CXX").unwrap_or_else(|_| "c++".to_owned())
}

/// Of the sources, the compiler's name and its options.
fn hash(folders: &[&Path]) -> u64 {
    let mut hasher = DefaultHasher::new();
    (compiler(), OPTIONS, env!("CARGO_PKG_VERSION")).hash(&mut hasher);
    for folder in folders {
        let mut files = files(folder, &["cu", "cuh", "h", "cpp"]);
        files.sort();
        files.iter().for_each(|file| (file, fs::read(file).expect("a source file")).hash(&mut hasher));
    }
    hasher.finish()
}

fn files(folder: &Path, extensions: &[&str]) -> Vec<PathBuf> {
    let entries = fs::read_dir(folder).expect("a folder of sources").flatten().map(|entry| entry.path());
    let wanted =
        |path: &PathBuf| path.extension().is_some_and(|e| extensions.iter().any(|wanted| e == *wanted));
    entries.filter(wanted).collect()
}

fn build(kernels: &Path, here: &Path, folder: &Path, library: &Path) {
    for old in files(folder, &["so"]) {
        let _ = fs::remove_file(old);
    }
    let unit = folder.join("kernels.cpp");
    fs::write(&unit, unit_of(kernels, here)).expect("the build's folder takes a file");
    let fresh = folder.join("fresh.so.part");
    let mut compile = Command::new(compiler());
    compile.args(OPTIONS).arg("-shared").arg("-I").arg(kernels).arg("-o").arg(&fresh);
    complete(compile.arg(&unit).arg(here.join("driver.cpp")));
    fs::rename(fresh, library).expect("within one folder");
}

/// C++ that takes every kernel in by its name. A namespace per file, and none of its macros in the next: files use the
/// same names for their own things.
fn unit_of(kernels: &Path, here: &Path) -> String {
    let table = here.join("table.h");
    let mut unit =
        format!("#include \"{}\"\n#include \"formats.cuh\"\n#include \"tile.cuh\"\n", table.display());
    let mut sources = files(kernels, &["cu"]);
    sources.sort();
    for source in sources {
        let name = source.file_name().expect("a file").to_string_lossy().into_owned();
        let space = name.trim_end_matches(".cu");
        unit +=
            &format!("namespace file_{space} {{\nusing ::widen;\n#include \"{name}\"\nint entered[] = {{\n");
        for entry in entries(&source) {
            unit += &format!("    stand_in::enter(\"{name}\", \"{entry}\", {entry}),\n");
        }
        unit += "};\n}\n";
        let text = fs::read_to_string(&source).expect("a source file");
        for line in text.lines().filter_map(|line| line.strip_prefix("#define ")) {
            let end = line.find(|c: char| !c.is_alphanumeric() && c != '_').unwrap_or(line.len());
            unit += &format!("#undef {}\n", &line[..end]);
        }
    }
    unit
}

/// Names of a file's kernels, macros expanded.
fn entries(source: &Path) -> Vec<String> {
    let mut preprocess = Command::new(compiler());
    preprocess.args(["-E", "-P", "-x", "c++", "-D__global__=", "-D__launch_bounds__(...)="]);
    let text = complete(preprocess.arg(source));
    let words = text.split_inclusive("extern \"C\"").skip(1).map(|rest| {
        let declared = rest.trim_start().strip_prefix("void").unwrap_or_default();
        declared.split('(').next().unwrap_or_default().trim().to_owned()
    });
    let names: Vec<String> = words.filter(|name| !name.is_empty()).collect();
    assert!(!names.is_empty(), "{} has no kernels", source.display());
    names
}

/// What a command prints.
fn complete(command: &mut Command) -> String {
    let done = command.output().unwrap_or_else(|e| {
        panic!("{command:?} cannot be started ({e}): a C++ compiler is needed; on Debian: apt install g++")
    });
    assert!(done.status.success(), "{command:?}\n{}", String::from_utf8_lossy(&done.stderr));
    String::from_utf8_lossy(&done.stdout).into_owned()
}
