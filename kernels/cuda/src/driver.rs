//! NVIDIA's driver, found at run time: which cards there are.

use libloading::Library;
use std::ffi::{CStr, c_char, c_int, c_uint, c_void};
use std::path::{Path, PathBuf};

/// Environment variable with the path of a driver to use instead.
pub const VARIABLE: &str = "HEARTH_CUDA_DRIVER";

/// Names the library is looked for by.
const NAMES: &[&str] = &["libcuda.so.1", "libcuda.so"];

/// The oldest CUDA whose driver loads what our compiler makes, as the driver counts: 1000·major + 10·minor.
const OLDEST: c_int = 12000;

/// Compute capabilities below this one lack bf16 and asynchronous copies.
pub const OLDEST_CARD: (i32, i32) = (8, 0);

/// `CUDA_ERROR_NO_DEVICE`.
const NO_DEVICE: c_int = 100;

/// Why there are no cards to list.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// No library.
    #[error("no NVIDIA driver: {library} cannot be loaded")]
    Missing {
        /// Its path or name.
        library: String,
    },
    /// A library without what every driver has.
    #[error("{library} is not an NVIDIA driver: it lacks {function}")]
    Foreign {
        /// Its path or name.
        library: String,
        /// What it lacks.
        function: &'static str,
    },
    /// A driver from before what we need.
    #[error("the NVIDIA driver is made for CUDA {major}.{minor}, 12.0 or newer is needed: update the driver")]
    TooOld {
        /// Major version.
        major: i32,
        /// Minor version.
        minor: i32,
    },
    /// A driver, but nothing to drive.
    #[error("the NVIDIA driver finds no card")]
    NoCard,
    /// A call failed.
    #[error("the NVIDIA driver: {call} failed with code {code} ({text})")]
    Call {
        /// Function.
        call: &'static str,
        /// Its result.
        code: c_int,
        /// What the driver calls it.
        text: String,
    },
}

impl Error {
    pub(crate) fn missing(library: &Path) -> Self {
        Self::Missing { library: library.display().to_string() }
    }
}

/// A card as the driver describes it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Card {
    /// Its name.
    pub name: String,
    /// Compute capability, major and minor.
    pub capability: (i32, i32),
    /// Memory.
    pub total_bytes: u64,
    /// Memory nobody holds; `None` when the card lets us not in (exclusive mode).
    pub free_bytes: Option<u64>,
}

impl Card {
    /// Whether our kernels run on it.
    pub fn is_supported(&self) -> bool {
        self.capability >= OLDEST_CARD
    }
}

type Context = *mut c_void;

/// The driver.
pub struct Driver {
    error_string: unsafe extern "C" fn(c_int, *mut *const c_char) -> c_int,
    version: unsafe extern "C" fn(*mut c_int) -> c_int,
    count: unsafe extern "C" fn(*mut c_int) -> c_int,
    get: unsafe extern "C" fn(*mut c_int, c_int) -> c_int,
    name: unsafe extern "C" fn(*mut c_char, c_int, c_int) -> c_int,
    attribute: unsafe extern "C" fn(*mut c_int, c_int, c_int) -> c_int,
    total: unsafe extern "C" fn(*mut usize, c_int) -> c_int,
    retain: unsafe extern "C" fn(*mut Context, c_int) -> c_int,
    release: unsafe extern "C" fn(c_int) -> c_int,
    push: unsafe extern "C" fn(Context) -> c_int,
    pop: unsafe extern "C" fn(*mut Context) -> c_int,
    memory: unsafe extern "C" fn(*mut usize, *mut usize) -> c_int,
    path: PathBuf,
    /// Keeps the functions' code mapped.
    _library: Library,
}

impl Driver {
    /// Loads and starts the driver, the one that [`VARIABLE`] names if it is set.
    ///
    /// # Errors
    /// One sentence each for no driver, too old a one, and one that finds no card.
    pub fn open() -> Result<Self, Error> {
        if let Some(path) = std::env::var_os(VARIABLE) {
            return Self::open_at(Path::new(&path));
        }
        NAMES
            .iter()
            .find_map(|name| Self::load(Path::new(name)))
            .unwrap_or(Err(Error::missing(NAMES[0].as_ref())))
    }

    /// As [`Self::open`], with this library.
    ///
    /// # Errors
    /// As [`Self::open`].
    pub fn open_at(path: &Path) -> Result<Self, Error> {
        Self::load(path).unwrap_or(Err(Error::missing(path)))
    }

    fn load(path: &Path) -> Option<Result<Self, Error>> {
        // SAFETY: the driver's initialisers have no preconditions.
        let library = unsafe { Library::new(path) }.ok()?;
        Some(Self::of(library, path))
    }

    /// The library it lies in.
    pub fn path(&self) -> &Path {
        &self.path
    }

    fn of(library: Library, path: &Path) -> Result<Self, Error> {
        macro_rules! function {
            ($name:literal) => {
                // SAFETY: the type is that of the driver's documented interface, unchanged since CUDA 7.
                *unsafe { library.get($name) }
                    .map_err(|_| Error::Foreign { library: path.display().to_string(), function: $name })?
            };
        }
        let init: unsafe extern "C" fn(c_uint) -> c_int = function!("cuInit");
        let driver = Self {
            error_string: function!("cuGetErrorString"),
            version: function!("cuDriverGetVersion"),
            count: function!("cuDeviceGetCount"),
            get: function!("cuDeviceGet"),
            name: function!("cuDeviceGetName"),
            attribute: function!("cuDeviceGetAttribute"),
            total: function!("cuDeviceTotalMem_v2"),
            retain: function!("cuDevicePrimaryCtxRetain"),
            release: function!("cuDevicePrimaryCtxRelease_v2"),
            push: function!("cuCtxPushCurrent_v2"),
            pop: function!("cuCtxPopCurrent_v2"),
            memory: function!("cuMemGetInfo_v2"),
            path: path.to_owned(),
            _library: library,
        };
        let (major, minor) = driver.version()?;
        if 1000 * major + 10 * minor < OLDEST {
            return Err(Error::TooOld { major, minor });
        }
        // SAFETY: the only flag there is, 0.
        match unsafe { init(0) } {
            NO_DEVICE => Err(Error::NoCard),
            code => driver.check("cuInit", code).map(|()| driver),
        }
    }

    /// The newest CUDA it is made for, major and minor.
    ///
    /// # Errors
    /// [`Error::Call`].
    pub fn version(&self) -> Result<(i32, i32), Error> {
        let mut version = 0;
        // SAFETY: an integer to write.
        self.check("cuDriverGetVersion", unsafe { (self.version)(&mut version) })?;
        Ok((version / 1000, version % 1000 / 10))
    }

    /// Every card.
    ///
    /// # Errors
    /// [`Error::NoCard`], [`Error::Call`].
    pub fn cards(&self) -> Result<Vec<Card>, Error> {
        let mut count = 0;
        // SAFETY: an integer to write.
        self.check("cuDeviceGetCount", unsafe { (self.count)(&mut count) })?;
        if count <= 0 {
            return Err(Error::NoCard);
        }
        (0..count).map(|ordinal| self.card(ordinal)).collect()
    }

    fn card(&self, ordinal: c_int) -> Result<Card, Error> {
        let (mut device, mut total, mut name) = (0, 0, [0u8; 256]);
        // SAFETY: places to write: an integer, as many bytes as announced, a number.
        let codes = unsafe {
            [
                ("cuDeviceGet", (self.get)(&mut device, ordinal)),
                ("cuDeviceGetName", (self.name)(name.as_mut_ptr().cast(), name.len() as c_int, device)),
                ("cuDeviceTotalMem", (self.total)(&mut total, device)),
            ]
        };
        codes.into_iter().try_for_each(|(call, code)| self.check(call, code))?;
        let name = CStr::from_bytes_until_nul(&name).unwrap_or_default().to_string_lossy().into_owned();
        Ok(Card {
            name,
            capability: (self.attribute(device, 75)?, self.attribute(device, 76)?),
            total_bytes: total as u64,
            free_bytes: self.free_bytes(device),
        })
    }

    /// `CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR` is 75, `…_MINOR` 76.
    fn attribute(&self, device: c_int, attribute: c_int) -> Result<c_int, Error> {
        let mut value = 0;
        // SAFETY: an integer to write.
        self.check("cuDeviceGetAttribute", unsafe { (self.attribute)(&mut value, attribute, device) })?;
        Ok(value)
    }

    /// Asks within the card's primary context, which it gives back.
    fn free_bytes(&self, device: c_int) -> Option<u64> {
        let (mut context, mut free, mut total) = (std::ptr::null_mut(), 0, 0);
        // SAFETY: a place to write; a context that was retained is pushed, popped and released once.
        unsafe {
            if (self.retain)(&mut context, device) != 0 {
                return None;
            }
            let mut code = (self.push)(context);
            if code == 0 {
                code = (self.memory)(&mut free, &mut total);
                (self.pop)(&mut context);
            }
            (self.release)(device);
            (code == 0).then_some(free as u64)
        }
    }

    fn check(&self, call: &'static str, code: c_int) -> Result<(), Error> {
        if code == 0 {
            return Ok(());
        }
        let mut text = std::ptr::null();
        // SAFETY: a place for a pointer to a text that lives as long as the driver; null for codes it does not know.
        let text = unsafe {
            (self.error_string)(code, &mut text);
            if text.is_null() {
                "unknown".into()
            } else {
                CStr::from_ptr(text).to_string_lossy().into_owned()
            }
        };
        Err(Error::Call { call, code, text })
    }
}
