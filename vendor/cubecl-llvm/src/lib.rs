//! Offline stand-in for `cubecl-llvm` 0.11.3.
//!
//! The real crate downloads LLVM while building, which an offline machine cannot do. `cubecl-cuda` only
//! names its types: with the `cpp` feature every CUDA kernel goes through NVRTC, and the compiler below
//! is never asked for code. If it is, it answers with an error that says so.

use cubecl_core::{ir::nvidia::SmArch, prelude::KernelDefinition};
use cubecl_environment::backtrace::BackTrace;
use cubecl_runtime::compiler::{CompilationError, Compiler};
use cubecl_runtime::kernel::BufferIOAttr;

/// NVPTX target details.
pub mod nvptx {
    /// PTX instruction-set versions.
    pub mod ptx_version {
        use core::fmt;

        /// A PTX version, as `ptx<number>`.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        pub struct PtxVersion(u32);

        impl PtxVersion {
            /// No driver is served by this stand-in.
            pub fn for_driver(_driver: i32) -> Option<Self> {
                None
            }
        }

        impl fmt::Display for PtxVersion {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "ptx{}", self.0)
            }
        }
    }
}

/// Names shared between targets.
pub mod shared {
    /// What a target cannot lower.
    pub mod lowered_features {
        use cubecl_core::ir::DeviceProperties;

        /// GPU targets of the real crate that its dependents name.
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub enum GpuTarget {
            /// NVIDIA.
            Nvptx,
        }

        /// Nothing is restricted: nothing is lowered here.
        pub fn restrict_features(_properties: &mut DeviceProperties, _target: GpuTarget) {}
    }
}

/// Code generation targets.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum LlvmTarget {
    /// The host.
    #[default]
    Cpu,
    /// NVIDIA.
    Nvptx,
}

/// The compiler that is never reached with `cubecl-cuda/cpp`.
#[derive(Clone, Debug, Default)]
pub struct PlironCompiler {
    /// Target asked for.
    pub target: LlvmTarget,
}

/// Options of the real compiler, kept for their names.
#[derive(Clone, Debug, Default)]
pub struct PlironOptions {
    /// AMD architecture.
    pub arch: Option<()>,
    /// NVIDIA architecture.
    pub sm_arch: Option<SmArch>,
    /// PTX version.
    pub ptx_version: Option<nvptx::ptx_version::PtxVersion>,
    /// Whether kernel arguments are grid constants.
    pub grid_constants: bool,
}

/// A compiled PTX module.
#[derive(Clone, Debug)]
pub struct NvptxModule {
    /// PTX text.
    pub ptx: Vec<core::ffi::c_char>,
    /// Kernel name.
    pub entrypoint: String,
    /// Intermediate representation.
    pub ir: String,
    /// Bytes of shared memory.
    pub shared_memory_size: usize,
    /// Buffer attributes.
    pub io: Vec<BufferIOAttr>,
}

/// What compilation would yield.
#[derive(Clone)]
pub enum PlironArtifact {
    /// PTX.
    NvptxCode(NvptxModule),
    /// Keeps matches on the type non-exhaustive, as with the real crate.
    #[doc(hidden)]
    Other,
}

impl core::fmt::Display for PlironArtifact {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.write_str("no code: built without LLVM")
    }
}

impl Compiler for PlironCompiler {
    type Representation = PlironArtifact;
    type CompilationOptions = PlironOptions;

    fn compile(
        &mut self,
        _kernel: KernelDefinition,
        _options: &PlironOptions,
    ) -> Result<PlironArtifact, CompilationError> {
        Err(CompilationError::Generic {
            reason: "built without LLVM: CUDA kernels go through NVRTC (feature cubecl-cuda/cpp)".into(),
            backtrace: BackTrace::capture(),
        })
    }

    fn extension(&self) -> &'static str {
        "ll"
    }

    fn lang_tag(&self) -> &'static str {
        "llvm"
    }
}
