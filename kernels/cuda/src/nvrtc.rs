//! NVIDIA's run-time compiler, found at run time.

use crate::sources::{HEADERS, Source};
use libloading::Library;
use std::ffi::{CStr, CString, c_char, c_int, c_void};
use std::path::{Path, PathBuf};
use std::ptr::null_mut;

/// Names the library is looked for by, the newest first.
const NAMES: &[&str] = &["libnvrtc.so.13", "libnvrtc.so.12", "libnvrtc.so"];

/// What every kernel is compiled with, besides its architecture.
pub const OPTIONS: &[&str] = &["--std=c++17", "--fmad=false", "-default-device", "--ptxas-options=-v"];

/// Environment variable with the path of a library to use instead.
pub const VARIABLE: &str = "HEARTH_NVRTC";

/// Why there is no code.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// No library.
    #[error(
        "NVRTC, CUDA's run-time compiler, cannot be loaded ({0}); pip install nvidia-cuda-nvrtc-cu12, or point HEARTH_NVRTC at a libnvrtc.so"
    )]
    Missing(String),
    /// A library without what every NVRTC has.
    #[error("{library} is not an NVRTC: it lacks {function}")]
    Foreign {
        /// Its path or name.
        library: String,
        /// What it lacks.
        function: &'static str,
    },
    /// The sources do not compile.
    #[error("{source_name} does not compile for {arch}:\n{log}")]
    Compile {
        /// File.
        source_name: &'static str,
        /// Architecture.
        arch: String,
        /// What the compiler says.
        log: String,
    },
    /// A call failed that never should.
    #[error("NVRTC: {call} failed with code {code}")]
    Call {
        /// Function.
        call: &'static str,
        /// Its result.
        code: c_int,
    },
}

type Program = *mut c_void;
type Create = unsafe extern "C" fn(
    *mut Program,
    *const c_char,
    *const c_char,
    c_int,
    *const *const c_char,
    *const *const c_char,
) -> c_int;
type Size = unsafe extern "C" fn(Program, *mut usize) -> c_int;
type Bytes = unsafe extern "C" fn(Program, *mut c_char) -> c_int;

/// The compiler.
pub struct Nvrtc {
    version: unsafe extern "C" fn(*mut c_int, *mut c_int) -> c_int,
    create: Create,
    destroy: unsafe extern "C" fn(*mut Program) -> c_int,
    compile: unsafe extern "C" fn(Program, c_int, *const *const c_char) -> c_int,
    log_size: Size,
    log: Bytes,
    cubin_size: Size,
    cubin: Bytes,
    ptx_size: Size,
    ptx: Bytes,
    num_architectures: unsafe extern "C" fn(*mut c_int) -> c_int,
    architectures: unsafe extern "C" fn(*mut c_int) -> c_int,
    /// Keeps the functions' code mapped.
    _library: Library,
}

/// Code for one architecture.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Compiled {
    /// What the driver loads: an ELF image for one architecture, or PTX (a terminated text) for `compute_…`.
    pub cubin: Vec<u8>,
    /// What the compiler says, with each kernel's use of the machine.
    pub log: String,
}

impl Nvrtc {
    /// Loads the library that [`VARIABLE`] names, or else the newest one the loader finds.
    ///
    /// # Errors
    /// [`Error::Missing`], [`Error::Foreign`].
    pub fn open() -> Result<Self, Error> {
        match std::env::var_os(VARIABLE) {
            Some(path) => Self::open_at(Path::new(&path)),
            None => Self::first_of(NAMES.iter().map(PathBuf::from).collect()),
        }
    }

    /// This library.
    ///
    /// # Errors
    /// As [`Self::open`].
    pub fn open_at(path: &Path) -> Result<Self, Error> {
        Self::first_of(vec![path.to_owned()])
    }

    fn first_of(candidates: Vec<PathBuf>) -> Result<Self, Error> {
        let mut reasons = Vec::new();
        for candidate in candidates {
            // SAFETY: NVRTC's initialisers have no preconditions; what the user points at is the user's.
            match unsafe { Library::new(&candidate) } {
                Ok(library) => return Self::of(library, &candidate.display().to_string()),
                Err(error) => reasons.push(match std::error::Error::source(&error) {
                    // The loader's own words name the library.
                    Some(why) => why.to_string(),
                    None => format!("{}: {error}", candidate.display()),
                }),
            }
        }
        Err(Error::Missing(reasons.join("; ")))
    }

    fn of(library: Library, name: &str) -> Result<Self, Error> {
        macro_rules! function {
            ($name:literal) => {
                // SAFETY: the type is that of NVRTC's documented interface, unchanged since CUDA 11.1.
                *unsafe { library.get($name) }
                    .map_err(|_| Error::Foreign { library: name.to_owned(), function: $name })?
            };
        }
        Ok(Self {
            version: function!("nvrtcVersion"),
            create: function!("nvrtcCreateProgram"),
            destroy: function!("nvrtcDestroyProgram"),
            compile: function!("nvrtcCompileProgram"),
            log_size: function!("nvrtcGetProgramLogSize"),
            log: function!("nvrtcGetProgramLog"),
            cubin_size: function!("nvrtcGetCUBINSize"),
            cubin: function!("nvrtcGetCUBIN"),
            ptx_size: function!("nvrtcGetPTXSize"),
            ptx: function!("nvrtcGetPTX"),
            num_architectures: function!("nvrtcGetNumSupportedArchs"),
            architectures: function!("nvrtcGetSupportedArchs"),
            _library: library,
        })
    }

    /// Major and minor version.
    ///
    /// # Errors
    /// [`Error::Call`].
    pub fn version(&self) -> Result<(i32, i32), Error> {
        let (mut major, mut minor) = (0, 0);
        // SAFETY: two integers to write.
        check("nvrtcVersion", unsafe { (self.version)(&mut major, &mut minor) })?;
        Ok((major, minor))
    }

    /// Architectures it makes code for, ascending: 80, 86, ….
    ///
    /// # Errors
    /// [`Error::Call`].
    pub fn architectures(&self) -> Result<Vec<i32>, Error> {
        let mut count = 0;
        // SAFETY: an integer to write.
        check("nvrtcGetNumSupportedArchs", unsafe { (self.num_architectures)(&mut count) })?;
        let mut all = vec![0; usize::try_from(count).unwrap_or_default()];
        // SAFETY: room for as many as it said.
        check("nvrtcGetSupportedArchs", unsafe { (self.architectures)(all.as_mut_ptr()) })?;
        Ok(all)
    }

    /// Compiles a file for an architecture as `sm_90a`, or to PTX for `compute_80`.
    ///
    /// # Errors
    /// [`Error::Compile`] with the compiler's log.
    pub fn compile(&self, source: &Source, arch: &str) -> Result<Compiled, Error> {
        let program = self.program(source)?;
        let target = format!("--gpu-architecture={arch}");
        let options: Vec<CString> = OPTIONS.iter().copied().chain([target.as_str()]).map(text).collect();
        let pointers: Vec<*const c_char> = options.iter().map(|o| o.as_ptr()).collect();
        // SAFETY: a live program and as many strings as announced.
        let code = unsafe { (self.compile)(program.raw, pointers.len() as c_int, pointers.as_ptr()) };
        let log = program.bytes("nvrtcGetProgramLog", self.log_size, self.log)?;
        let log = CStr::from_bytes_until_nul(&log).unwrap_or_default().to_string_lossy().into_owned();
        if code != 0 {
            return Err(Error::Compile { source_name: source.name, arch: arch.to_owned(), log });
        }
        let cubin = match arch.starts_with("compute_") {
            true => program.bytes("nvrtcGetPTX", self.ptx_size, self.ptx)?,
            false => program.bytes("nvrtcGetCUBIN", self.cubin_size, self.cubin)?,
        };
        Ok(Compiled { cubin, log })
    }

    fn program(&self, source: &Source) -> Result<Owned<'_>, Error> {
        let strings = |of: fn(&Source) -> &'static str| -> Vec<CString> {
            HEADERS.iter().map(|h| text(of(h))).collect()
        };
        let (texts, names) = (strings(|h| h.text), strings(|h| h.name));
        let pointers = |s: &[CString]| -> Vec<*const c_char> { s.iter().map(|s| s.as_ptr()).collect() };
        let (main, name) = (text(source.text), text(source.name));
        let mut raw = null_mut();
        // SAFETY: terminated strings that outlive the call, as many headers as names.
        let code = unsafe {
            let (texts, names) = (pointers(&texts), pointers(&names));
            (self.create)(
                &mut raw,
                main.as_ptr(),
                name.as_ptr(),
                HEADERS.len() as c_int,
                texts.as_ptr(),
                names.as_ptr(),
            )
        };
        check("nvrtcCreateProgram", code)?;
        Ok(Owned { nvrtc: self, raw })
    }
}

/// A program, destroyed when dropped.
struct Owned<'a> {
    nvrtc: &'a Nvrtc,
    raw: Program,
}

impl Owned<'_> {
    fn bytes(&self, call: &'static str, size: Size, read: Bytes) -> Result<Vec<u8>, Error> {
        let mut len = 0;
        // SAFETY: a live program, a number to write.
        check(call, unsafe { size(self.raw, &mut len) })?;
        let mut bytes = vec![0u8; len];
        // SAFETY: room for as many bytes as it said.
        check(call, unsafe { read(self.raw, bytes.as_mut_ptr().cast()) })?;
        Ok(bytes)
    }
}

impl Drop for Owned<'_> {
    fn drop(&mut self) {
        // SAFETY: made by this library, destroyed once.
        unsafe { (self.nvrtc.destroy)(&mut self.raw) };
    }
}

fn text(s: impl Into<Vec<u8>>) -> CString {
    CString::new(s).expect("sources, names and options hold no zero byte")
}

fn check(call: &'static str, code: c_int) -> Result<(), Error> {
    if code == 0 { Ok(()) } else { Err(Error::Call { call, code }) }
}
