//! What the card does and in which order: streams, events, code, launches, graphs.

use super::api::Handle;
use super::{Context, Memory};
use crate::runtime::Error;
use std::ffi::{CString, c_void};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

/// Work that happens in the order it was sent.
pub(crate) struct Stream {
    context: Arc<Context>,
    handle: Handle,
    capturing: AtomicBool,
}

impl Stream {
    /// A stream that waits for no other unless told to.
    pub fn new(context: &Arc<Context>) -> Result<Self, Error> {
        context.enter()?;
        let mut handle = Handle::NULL;
        // SAFETY: a handle to write, within a current context; 1 is CU_STREAM_NON_BLOCKING.
        context.check("cuStreamCreate", unsafe { (context.api.stream_create)(&mut handle, 1) })?;
        Ok(Self { context: context.clone(), handle, capturing: AtomicBool::new(false) })
    }

    pub(super) fn handle(&self) -> Handle {
        self.handle
    }

    /// Waits until everything sent is done.
    pub fn synchronize(&self) -> Result<(), Error> {
        self.must_not_capture("waiting")?;
        self.context.enter()?;
        // SAFETY: a live stream.
        self.context
            .check("cuStreamSynchronize", unsafe { (self.context.api.stream_synchronize)(self.handle) })
    }

    /// What is sent from now on waits for what the event marks.
    pub fn wait(&self, event: &Event) -> Result<(), Error> {
        self.must_not_capture("waiting for another stream")?;
        self.context.enter()?;
        // SAFETY: a live stream and a live event; an event that was never recorded marks nothing.
        self.context.check("cuStreamWaitEvent", unsafe {
            (self.context.api.stream_wait)(self.handle, event.handle, 0)
        })
    }

    pub(super) fn must_not_capture(&self, what: &'static str) -> Result<(), Error> {
        if self.capturing.load(Ordering::Relaxed) { Err(Error::Capturing { what }) } else { Ok(()) }
    }

    /// Sends a kernel.
    ///
    /// # Panics
    /// When the arguments are not those the driver says the kernel takes: a mistake of ours.
    pub fn launch(&self, function: &Function, grid: Grid, arguments: &[Argument]) -> Result<(), Error> {
        if let Some(sizes) = &function.sizes {
            let given = arguments.iter().map(|a| a.len).collect::<Vec<_>>();
            assert_eq!(given, *sizes, "bytes of the arguments of {}", function.name);
        }
        function.grant(grid.shared_bytes)?;
        self.context.enter()?;
        let mut pointers: Vec<*mut c_void> =
            arguments.iter().map(|a| a.bytes.as_ptr().cast_mut().cast()).collect();
        let ([gx, gy, gz], block) = (grid.blocks, grid.threads);
        // SAFETY: a live function; as many pointers as it has parameters, each to as many bytes (checked above where the
        // driver tells), which the call reads before it returns. Addresses are of card memory that waits for the card
        // before it is freed; the ops that come here have checked that their kernels stay within it.
        let code = unsafe {
            (self.context.api.launch)(
                function.handle,
                gx,
                gy,
                gz,
                block,
                1,
                1,
                grid.shared_bytes,
                self.handle,
                pointers.as_mut_ptr(),
                std::ptr::null_mut(),
            )
        };
        self.context.check("cuLaunchKernel", code)
    }

    /// Records what `send` sends instead of doing it.
    pub fn capture(&self, send: impl FnOnce() -> Result<(), Error>) -> Result<Graph, Error> {
        self.context.enter()?;
        // SAFETY: a live stream; 2 is the relaxed mode: other threads may go on.
        let code = unsafe { (self.context.api.capture_begin)(self.handle, 2) };
        self.context.check("cuStreamBeginCapture", code)?;
        self.capturing.store(true, Ordering::Relaxed);
        let sent = send();
        self.capturing.store(false, Ordering::Relaxed);
        let mut graph = Handle::NULL;
        // SAFETY: a live stream that captures; a handle to write.
        let code = unsafe { (self.context.api.capture_end)(self.handle, &mut graph) };
        self.context.check("cuStreamEndCapture", code)?;
        let mut ready = Handle::NULL;
        // SAFETY: a live graph, a handle to write; the graph is destroyed once and not used again.
        let code = unsafe {
            let code =
                if sent.is_ok() { (self.context.api.graph_instantiate)(&mut ready, graph, 0) } else { 0 };
            (self.context.api.graph_destroy)(graph);
            code
        };
        sent?;
        self.context.check("cuGraphInstantiate", code)?;
        Ok(Graph { context: self.context.clone(), handle: ready })
    }

    /// Sends everything a graph recorded.
    pub fn replay(&self, graph: &Graph) -> Result<(), Error> {
        self.must_not_capture("replaying a graph")?;
        self.context.enter()?;
        // SAFETY: a live graph, a live stream. The caller keeps the memory that it reaches, see `Recorded`.
        self.context
            .check("cuGraphLaunch", unsafe { (self.context.api.graph_launch)(graph.handle, self.handle) })
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        if self.context.enter().is_ok() {
            // SAFETY: made by this driver, destroyed once; the driver finishes what was sent.
            unsafe { (self.context.api.stream_destroy)(self.handle) };
        }
    }
}

/// A point in a stream.
pub(crate) struct Event {
    context: Arc<Context>,
    handle: Handle,
}

impl Event {
    /// One that marks nothing yet; `timed` ones take the time when they pass.
    pub fn new(context: &Arc<Context>, timed: bool) -> Result<Self, Error> {
        context.enter()?;
        let mut handle = Handle::NULL;
        // SAFETY: a handle to write, within a current context; 2 is CU_EVENT_DISABLE_TIMING.
        let code = unsafe { (context.api.event_create)(&mut handle, if timed { 0 } else { 2 }) };
        context.check("cuEventCreate", code)?;
        Ok(Self { context: context.clone(), handle })
    }

    /// Marks everything the stream was sent so far.
    pub fn record(&self, stream: &Stream) -> Result<(), Error> {
        self.context.enter()?;
        // SAFETY: a live event, a live stream.
        let code = unsafe { (self.context.api.event_record)(self.handle, stream.handle) };
        self.context.check("cuEventRecord", code)
    }

    /// Waits until what it marks is done.
    pub fn synchronize(&self) -> Result<(), Error> {
        self.context.enter()?;
        // SAFETY: a live event.
        self.context.check("cuEventSynchronize", unsafe { (self.context.api.event_synchronize)(self.handle) })
    }

    /// Milliseconds from this event to a later one, once both have passed.
    pub fn milliseconds_to(&self, later: &Event) -> Result<f32, Error> {
        later.synchronize()?;
        let mut milliseconds = 0.0;
        // SAFETY: two live events, a number to write.
        let code = unsafe { (self.context.api.event_elapsed)(&mut milliseconds, self.handle, later.handle) };
        self.context.check("cuEventElapsedTime", code)?;
        Ok(milliseconds)
    }
}

impl Drop for Event {
    fn drop(&mut self) {
        if self.context.enter().is_ok() {
            // SAFETY: made by this driver, destroyed once.
            unsafe { (self.context.api.event_destroy)(self.handle) };
        }
    }
}

/// Code on the card.
pub(crate) struct Module {
    context: Arc<Context>,
    handle: Handle,
}

impl Module {
    /// Loads an ELF image, or PTX that ends with a zero byte.
    pub fn new(context: &Arc<Context>, image: &[u8]) -> Result<Self, Error> {
        assert!(
            image.starts_with(b"\x7fELF") || image.ends_with(b"\0"),
            "an image the driver can find the end of"
        );
        context.enter()?;
        let mut handle = Handle::NULL;
        // SAFETY: a handle to write; an ELF image says its own length, a text ends with a zero.
        let code = unsafe { (context.api.module_load)(&mut handle, image.as_ptr().cast()) };
        context.check("cuModuleLoadData", code)?;
        Ok(Self { context: context.clone(), handle })
    }
}

impl Drop for Module {
    fn drop(&mut self) {
        if self.context.synchronize().is_ok() {
            // SAFETY: loaded by this driver, unloaded once, and none of its kernels runs.
            unsafe { (self.context.api.module_unload)(self.handle) };
        }
    }
}

/// A kernel.
pub(crate) struct Function {
    module: Arc<Module>,
    handle: Handle,
    name: String,
    /// Bytes of each parameter, where the driver tells.
    sizes: Option<Vec<usize>>,
    /// Dynamic shared memory that its blocks may have.
    granted: AtomicU32,
}

impl Function {
    /// The kernel of this name.
    pub fn new(module: &Arc<Module>, name: &str) -> Result<Self, Error> {
        let context = &module.context;
        context.enter()?;
        let (mut handle, symbol) = (Handle::NULL, CString::new(name).expect("names hold no zero byte"));
        // SAFETY: a live module, a terminated name, a handle to write.
        let code = unsafe { (context.api.module_function)(&mut handle, module.handle, symbol.as_ptr()) };
        context.check("cuModuleGetFunction", code)?;
        let sizes = context.api.function_parameter.map(|parameter| {
            let size = |index| {
                let (mut offset, mut bytes) = (0, 0);
                // SAFETY: a live function, two numbers to write; past the last parameter the call fails.
                (unsafe { parameter(handle, index, &mut offset, &mut bytes) } == 0).then_some(bytes)
            };
            (0..).map_while(size).collect()
        });
        let granted = AtomicU32::new(48 << 10);
        Ok(Self { module: module.clone(), handle, name: name.to_owned(), sizes, granted })
    }

    /// More than 48 KiB of dynamic shared memory must be asked for.
    fn grant(&self, bytes: u32) -> Result<(), Error> {
        if bytes <= self.granted.load(Ordering::Relaxed) {
            return Ok(());
        }
        let context = &self.module.context;
        context.enter()?;
        // SAFETY: a live function; 8 is CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES.
        let code = unsafe { (context.api.function_set)(self.handle, 8, bytes as i32) };
        context.check("cuFuncSetAttribute", code)?;
        self.granted.store(bytes, Ordering::Relaxed);
        Ok(())
    }
}

/// How many blocks of how many threads, and each block's dynamic shared memory.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Grid {
    /// Blocks by axis.
    pub blocks: [u32; 3],
    /// Threads of a block.
    pub threads: u32,
    /// Bytes.
    pub shared_bytes: u32,
}

/// An argument of a kernel, as bytes.
#[repr(C, align(16))]
#[derive(Clone, Copy)]
pub(crate) struct Argument {
    bytes: [u8; 32],
    len: usize,
}

impl Argument {
    /// A value, as it lies in memory.
    pub fn of<T: bytemuck::Pod>(value: T) -> Self {
        let given = bytemuck::bytes_of(&value);
        let mut bytes = [0; 32];
        bytes[..given.len()].copy_from_slice(given);
        Self { bytes, len: given.len() }
    }

    /// An address.
    pub fn memory(memory: &Memory, offset: usize) -> Self {
        Self::of(memory.address() + offset as u64)
    }
}

/// Recorded work that can be sent again.
pub(crate) struct Graph {
    context: Arc<Context>,
    handle: Handle,
}

impl Drop for Graph {
    fn drop(&mut self) {
        if self.context.synchronize().is_ok() {
            // SAFETY: made by this driver, destroyed once, and not running.
            unsafe { (self.context.api.graph_forget)(self.handle) };
        }
    }
}
