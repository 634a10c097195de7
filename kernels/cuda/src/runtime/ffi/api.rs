//! The driver's functions by name.

use crate::driver::Error;
use libloading::Library;
use std::ffi::{c_char, c_int, c_uchar, c_uint, c_ulonglong, c_void};

/// A thing of the driver's: context, stream, event, module, function, graph.
#[repr(transparent)]
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) struct Handle(*mut c_void);

// SAFETY: the driver's handles are names of things it guards itself; its interface may be called from any thread.
unsafe impl Send for Handle {}
// SAFETY: as above.
unsafe impl Sync for Handle {}

impl Handle {
    /// Nothing.
    pub const NULL: Handle = Handle(std::ptr::null_mut());
}

macro_rules! api {
    ($($field:ident = $symbol:literal: fn($($argument:ty),*);)*) => {
        /// What the runtime calls. The types are those of the driver's documented interface, CUDA 12.0.
        pub(super) struct Api {
            $(pub $field: unsafe extern "C" fn($($argument),*) -> c_int,)*
            /// What a kernel takes; drivers from before CUDA 12.4 do not say.
            pub function_parameter: Option<unsafe extern "C" fn(Handle, usize, *mut usize, *mut usize) -> c_int>,
            /// Keeps the functions' code mapped.
            _library: Library,
        }

        impl Api {
            pub fn of(library: Library, name: &str) -> Result<Self, Error> {
                $(
                    // SAFETY: the type is that of the driver's interface.
                    let $field = *unsafe { library.get($symbol) }
                        .map_err(|_| Error::Foreign { library: name.to_owned(), function: $symbol })?;
                )*
                // SAFETY: as above.
                let function_parameter = unsafe { library.get("cuFuncGetParamInfo") }.ok().map(|f| *f);
                Ok(Self { $($field,)* function_parameter, _library: library })
            }
        }
    };
}

api! {
    error_string = "cuGetErrorString": fn(c_int, *mut *const c_char);
    device_get = "cuDeviceGet": fn(*mut c_int, c_int);
    device_attribute = "cuDeviceGetAttribute": fn(*mut c_int, c_int, c_int);
    context_retain = "cuDevicePrimaryCtxRetain": fn(*mut Handle, c_int);
    context_release = "cuDevicePrimaryCtxRelease_v2": fn(c_int);
    context_set = "cuCtxSetCurrent": fn(Handle);
    context_synchronize = "cuCtxSynchronize": fn();
    memory_info = "cuMemGetInfo_v2": fn(*mut usize, *mut usize);
    memory_alloc = "cuMemAlloc_v2": fn(*mut c_ulonglong, usize);
    memory_free = "cuMemFree_v2": fn(c_ulonglong);
    host_alloc = "cuMemHostAlloc": fn(*mut *mut c_void, usize, c_uint);
    host_free = "cuMemFreeHost": fn(*mut c_void);
    copy_to_card = "cuMemcpyHtoDAsync_v2": fn(c_ulonglong, *const c_void, usize, Handle);
    copy_to_host = "cuMemcpyDtoHAsync_v2": fn(*mut c_void, c_ulonglong, usize, Handle);
    copy_within = "cuMemcpyDtoDAsync_v2": fn(c_ulonglong, c_ulonglong, usize, Handle);
    fill = "cuMemsetD8Async": fn(c_ulonglong, c_uchar, usize, Handle);
    stream_create = "cuStreamCreate": fn(*mut Handle, c_uint);
    stream_destroy = "cuStreamDestroy_v2": fn(Handle);
    stream_synchronize = "cuStreamSynchronize": fn(Handle);
    stream_wait = "cuStreamWaitEvent": fn(Handle, Handle, c_uint);
    event_create = "cuEventCreate": fn(*mut Handle, c_uint);
    event_destroy = "cuEventDestroy_v2": fn(Handle);
    event_record = "cuEventRecord": fn(Handle, Handle);
    event_synchronize = "cuEventSynchronize": fn(Handle);
    event_elapsed = "cuEventElapsedTime": fn(*mut f32, Handle, Handle);
    module_load = "cuModuleLoadData": fn(*mut Handle, *const c_void);
    module_unload = "cuModuleUnload": fn(Handle);
    module_function = "cuModuleGetFunction": fn(*mut Handle, Handle, *const c_char);
    function_set = "cuFuncSetAttribute": fn(Handle, c_int, c_int);
    launch = "cuLaunchKernel": fn(Handle, c_uint, c_uint, c_uint, c_uint, c_uint, c_uint, c_uint, Handle, *mut *mut c_void, *mut *mut c_void);
    capture_begin = "cuStreamBeginCapture_v2": fn(Handle, c_int);
    capture_end = "cuStreamEndCapture": fn(Handle, *mut Handle);
    graph_instantiate = "cuGraphInstantiateWithFlags": fn(*mut Handle, Handle, c_ulonglong);
    graph_launch = "cuGraphLaunch": fn(Handle, Handle);
    graph_destroy = "cuGraphDestroy": fn(Handle);
    graph_forget = "cuGraphExecDestroy": fn(Handle);
}
