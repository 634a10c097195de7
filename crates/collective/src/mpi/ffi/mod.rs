//! The only unsafe code of this crate: the functions of an MPI library loaded at run time.
//!
//! Two binary interfaces exist: Open MPI's handles are pointers, to globals that the library exports; MPICH's (and
//! Intel MPI's, MVAPICH's) are integers fixed by its header. What uses them from outside is [`Transfer`].
#![allow(unsafe_code)]

mod transfer;

use std::ffi::{c_char, c_int, c_void};
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::sync::{Mutex, MutexGuard, PoisonError};

use libloading::os::unix::{Library as Dl, RTLD_GLOBAL, RTLD_NOW};

use crate::Error;
pub use transfer::Transfer;

/// The longest text an MPI library may write: MPICH's version string.
const TEXT_BYTES: usize = 8192;

/// `MPI_THREAD_SERIALIZED`, in both interfaces: calls from several threads, one at a time.
const THREAD_SERIALIZED: c_int = 2;

/// A value that names an object of the library.
trait Handle: Copy + Send + 'static {
    fn to_bits(self) -> u64;
    fn from_bits(bits: u64) -> Self;
}

/// MPICH.
impl Handle for c_int {
    fn to_bits(self) -> u64 {
        u64::from(self.cast_unsigned())
    }

    fn from_bits(bits: u64) -> Self {
        (bits as u32).cast_signed()
    }
}

/// Open MPI: a pointer as an integer, which is passed alike and may be sent to other threads.
impl Handle for usize {
    fn to_bits(self) -> u64 {
        self as u64
    }

    fn from_bits(bits: u64) -> Self {
        bits as usize
    }
}

type Move<P, H> = unsafe extern "C" fn(P, c_int, H, c_int, c_int, H, *mut H) -> c_int;

/// Functions and constants of one interface, `H` its handles.
struct Api<H> {
    world: H,
    byte: H,
    errors_return: H,
    tag_ub: c_int,
    status_ignore: usize,
    init_thread: unsafe extern "C" fn(*mut c_int, *mut c_void, c_int, *mut c_int) -> c_int,
    finalize: unsafe extern "C" fn() -> c_int,
    comm_set_errhandler: unsafe extern "C" fn(H, H) -> c_int,
    comm_get_attr: unsafe extern "C" fn(H, c_int, *mut *mut c_int, *mut c_int) -> c_int,
    comm_rank: unsafe extern "C" fn(H, *mut c_int) -> c_int,
    comm_size: unsafe extern "C" fn(H, *mut c_int) -> c_int,
    error_string: unsafe extern "C" fn(c_int, *mut c_char, *mut c_int) -> c_int,
    isend: Move<*const c_void, H>,
    irecv: Move<*mut c_void, H>,
    test: unsafe extern "C" fn(*mut H, *mut c_int, usize) -> c_int,
    cancel: unsafe extern "C" fn(*mut H) -> c_int,
    abort: unsafe extern "C" fn(H, c_int) -> c_int,
}

/// What the rest of the crate may ask of either interface; one call at a time.
trait Calls: Send {
    /// Returns rank, world size and the highest tag.
    fn init(&self) -> Result<(usize, usize, usize), Error>;
    fn finalize(&self) -> Result<(), Error>;
    /// # Safety
    /// The `bytes` stay readable and unwritten until the request is complete.
    unsafe fn send(&self, bytes: *const u8, length: usize, peer: usize, tag: usize) -> Result<u64, Error>;
    /// # Safety
    /// The `bytes` stay writable, and nobody else touches them, until the request is complete.
    unsafe fn receive(&self, bytes: *mut u8, length: usize, peer: usize, tag: usize) -> Result<u64, Error>;
    /// Whether `request`, which is not yet known to be complete, is. Then its value is void.
    fn test(&self, request: &mut u64) -> Result<bool, Error>;
    /// Asks a receive to complete without a message.
    fn cancel(&self, request: u64) -> Result<(), Error>;
    /// Ends every rank's process; the launcher ends with `code`. Does not return, if the library keeps its promise.
    fn abort(&self, code: i32) -> Result<(), Error>;
}

impl<H: Handle> Api<H> {
    fn check(&self, call: &str, code: c_int) -> Result<(), Error> {
        if code == 0 {
            return Ok(());
        }
        let (mut text, mut length) = ([0u8; TEXT_BYTES], 0);
        // SAFETY: the buffer is as long as any library's longest text.
        unsafe { (self.error_string)(code, text.as_mut_ptr().cast(), &mut length) };
        let text = String::from_utf8_lossy(&text[..usize::try_from(length).unwrap_or(0)]).into_owned();
        Err(Error::Mpi(format!("{call} failed: {text}")))
    }
}

/// `x` as the library counts.
fn int(x: usize) -> c_int {
    c_int::try_from(x).expect("ranks, tags and messages are below 2³¹")
}

impl<H: Handle> Calls for Api<H> {
    fn init(&self) -> Result<(usize, usize, usize), Error> {
        let mut granted = 0;
        // SAFETY: null for argc and argv is allowed since MPI-2; `connect` calls this once per process.
        let code = unsafe {
            (self.init_thread)(std::ptr::null_mut(), std::ptr::null_mut(), THREAD_SERIALIZED, &mut granted)
        };
        self.check("MPI_Init_thread", code)?;
        if granted < THREAD_SERIALIZED {
            let needed = "the library was built without MPI_THREAD_SERIALIZED, which is needed";
            return Err(Error::Mpi(needed.into()));
        }
        let (mut rank, mut size, mut tag_ub, mut found) = (0, 0, std::ptr::null_mut::<c_int>(), 0);
        // SAFETY: the library is initialised and the outputs are valid for writing.
        unsafe {
            self.check(
                "MPI_Comm_set_errhandler",
                (self.comm_set_errhandler)(self.world, self.errors_return),
            )?;
            self.check("MPI_Comm_rank", (self.comm_rank)(self.world, &mut rank))?;
            self.check("MPI_Comm_size", (self.comm_size)(self.world, &mut size))?;
            let code = (self.comm_get_attr)(self.world, self.tag_ub, &mut tag_ub, &mut found);
            self.check("MPI_Comm_get_attr", code)?;
        }
        // SAFETY: if found, it points to an int that lives as long as the communicator. The standard promises 32767.
        let tag_ub = if found != 0 && !tag_ub.is_null() { unsafe { *tag_ub } } else { 32767 };
        Ok((rank as usize, size as usize, tag_ub as usize))
    }

    fn finalize(&self) -> Result<(), Error> {
        // SAFETY: called once, when the last group has been dropped.
        self.check("MPI_Finalize", unsafe { (self.finalize)() })
    }

    unsafe fn send(&self, bytes: *const u8, length: usize, peer: usize, tag: usize) -> Result<u64, Error> {
        let (bytes, count, mut request) = (bytes.cast(), int(length), H::from_bits(0));
        // SAFETY: the caller keeps `bytes`; the rest is passed by value or valid for writing.
        let code =
            unsafe { (self.isend)(bytes, count, self.byte, int(peer), int(tag), self.world, &mut request) };
        self.check("MPI_Isend", code).map(|()| request.to_bits())
    }

    unsafe fn receive(&self, bytes: *mut u8, length: usize, peer: usize, tag: usize) -> Result<u64, Error> {
        let (bytes, count, mut request) = (bytes.cast(), int(length), H::from_bits(0));
        // SAFETY: the caller keeps `bytes`; the rest is passed by value or valid for writing.
        let code =
            unsafe { (self.irecv)(bytes, count, self.byte, int(peer), int(tag), self.world, &mut request) };
        self.check("MPI_Irecv", code).map(|()| request.to_bits())
    }

    fn test(&self, request: &mut u64) -> Result<bool, Error> {
        let (mut handle, mut done) = (H::from_bits(*request), 0);
        // SAFETY: the request came from `send` or `receive` and is not yet complete; no status is wanted.
        let code = unsafe { (self.test)(&mut handle, &mut done, self.status_ignore) };
        *request = handle.to_bits();
        self.check("MPI_Test", code).map(|()| done != 0)
    }

    fn cancel(&self, request: u64) -> Result<(), Error> {
        let mut handle = H::from_bits(request);
        // SAFETY: the request came from `receive` and is not yet complete.
        self.check("MPI_Cancel", unsafe { (self.cancel)(&mut handle) })
    }

    fn abort(&self, code: i32) -> Result<(), Error> {
        // SAFETY: the library is initialised; whatever transfers are open end with the process.
        self.check("MPI_Abort", unsafe { (self.abort)(self.world, code) })
    }
}

/// The function of that name.
fn function<F: Copy>(dl: &Dl, name: &str) -> Result<F, Error> {
    // SAFETY: every type below is the function's C prototype with handles of the interface that the library's own
    // version string names.
    let symbol = unsafe { dl.get::<F>(name.as_bytes()) };
    symbol.map(|symbol| *symbol).map_err(|error| Error::Mpi(error.to_string()))
}

/// The address of a global that Open MPI exports as a handle.
fn global(dl: &Dl, name: &str) -> Result<usize, Error> {
    // SAFETY: only the symbol's address is taken.
    let symbol = unsafe { dl.get::<*mut c_void>(name.as_bytes()) };
    symbol.map(|symbol| symbol.as_raw_ptr() as usize).map_err(|error| Error::Mpi(error.to_string()))
}

/// Loads the functions; `constants` are world, byte, errors_return, tag_ub and status_ignore.
fn api<H: Handle>(dl: &Dl, constants: (H, H, H, c_int, usize)) -> Result<Box<dyn Calls>, Error> {
    let (world, byte, errors_return, tag_ub, status_ignore) = constants;
    Ok(Box::new(Api {
        world,
        byte,
        errors_return,
        tag_ub,
        status_ignore,
        init_thread: function(dl, "MPI_Init_thread")?,
        finalize: function(dl, "MPI_Finalize")?,
        comm_set_errhandler: function(dl, "MPI_Comm_set_errhandler")?,
        comm_get_attr: function(dl, "MPI_Comm_get_attr")?,
        comm_rank: function(dl, "MPI_Comm_rank")?,
        comm_size: function(dl, "MPI_Comm_size")?,
        error_string: function(dl, "MPI_Error_string")?,
        isend: function(dl, "MPI_Isend")?,
        irecv: function(dl, "MPI_Irecv")?,
        test: function(dl, "MPI_Test")?,
        cancel: function(dl, "MPI_Cancel")?,
        abort: function(dl, "MPI_Abort")?,
    }))
}

/// An initialised MPI library and this process's place in its world.
pub struct Library {
    calls: Mutex<Box<dyn Calls>>,
    /// The library's own name for itself.
    pub version: String,
    pub rank: usize,
    pub world_size: usize,
    pub highest_tag: usize,
    /// Whether a transfer was given up. Then finalising would wait for it.
    abandoned: AtomicBool,
    /// The functions live as long as this.
    _dl: Dl,
}

impl Library {
    /// Loads and initialises the library in the file `name`; None if there is no such file. At most once per process.
    pub fn open(name: &str) -> Option<Result<Self, Error>> {
        // SAFETY: an MPI library may be loaded at any time. Its plugins look its symbols up, hence GLOBAL.
        let dl = unsafe { Dl::open(Some(name), RTLD_NOW | RTLD_GLOBAL) }.ok()?;
        Some(Self::init(dl))
    }

    fn init(dl: Dl) -> Result<Self, Error> {
        let version = version(&dl)?;
        let calls = if version.contains("Open MPI") {
            let global = |name| global(&dl, name);
            let (world, byte) = (global("ompi_mpi_comm_world")?, global("ompi_mpi_byte")?);
            api(&dl, (world, byte, global("ompi_mpi_errors_return")?, 0, 0))?
        } else if ["MPICH", "Intel(R) MPI", "MVAPICH"].iter().any(|name| version.contains(name)) {
            let handle = |bits: u32| bits.cast_signed();
            let (world, byte, errors_return) = (0x4400_0000, 0x4c00_010d, 0x5400_0001);
            api(&dl, (handle(world), handle(byte), handle(errors_return), 0x6440_0001, 1))?
        } else {
            return Err(Error::Mpi(format!("{version} is neither Open MPI nor of MPICH's family")));
        };
        let (rank, world_size, highest_tag) = calls.init()?;
        let (calls, abandoned) = (Mutex::new(calls), AtomicBool::new(false));
        Ok(Self { calls, version, rank, world_size, highest_tag, abandoned, _dl: dl })
    }

    /// Ends the processes of all ranks; the launcher's exit code is `code`. Returns if the library cannot do that.
    pub fn abort(&self, code: i32) {
        self.calls().abort(code).ok();
    }

    /// Ends without finalising.
    pub fn abandon(&self) {
        self.abandoned.store(true, SeqCst);
    }

    /// One caller at a time: all that was asked of the library is `MPI_THREAD_SERIALIZED`.
    fn calls(&self) -> MutexGuard<'_, Box<dyn Calls>> {
        self.calls.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The first line of what the library says of itself, which it may do before it is initialised.
fn version(dl: &Dl) -> Result<String, Error> {
    let get: unsafe extern "C" fn(*mut c_char, *mut c_int) -> c_int =
        function(dl, "MPI_Get_library_version")?;
    let (mut text, mut length) = ([0u8; TEXT_BYTES], 0);
    // SAFETY: the buffer is as long as any library's longest text.
    unsafe { get(text.as_mut_ptr().cast(), &mut length) };
    let text = String::from_utf8_lossy(&text[..usize::try_from(length).unwrap_or(0)]).into_owned();
    Ok(text.lines().next().unwrap_or_default().split(',').next().unwrap_or_default().trim().to_owned())
}

impl Drop for Library {
    fn drop(&mut self) {
        if !self.abandoned.load(SeqCst) {
            // The process is about to end and every rank has what it wanted.
            self.calls().finalize().ok();
        }
    }
}
