//! What kernels take of a multiprocessor, out of the compiler's log.

/// One kernel's use.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Usage {
    /// Kernel.
    pub name: String,
    /// Registers per thread.
    pub registers: u32,
    /// Bytes of local memory per thread: arrays that did not become registers.
    pub stack_bytes: u32,
    /// Bytes of registers stored to and loaded from memory.
    pub spill_bytes: u32,
    /// Bytes of static shared memory per block.
    pub shared_bytes: u32,
}

/// Every kernel that a log speaks of.
pub fn usages(log: &str) -> Vec<Usage> {
    let mut all: Vec<Usage> = Vec::new();
    for line in log.lines() {
        if let Some((_, rest)) = line.split_once("Compiling entry function '") {
            let name = rest.split('\'').next().unwrap_or_default();
            all.push(Usage { name: name.to_owned(), ..Usage::default() });
        }
        let Some(kernel) = all.last_mut() else { continue };
        if line.contains("stack frame") {
            kernel.stack_bytes = before(line, "bytes stack frame");
            kernel.spill_bytes = before(line, "bytes spill stores") + before(line, "bytes spill loads");
        } else if line.contains("Used ") {
            kernel.registers = before(line, "registers");
            kernel.shared_bytes = before(line, "bytes smem");
        }
    }
    all
}

/// The number in front of `unit`, 0 if there is none.
fn before(line: &str, unit: &str) -> u32 {
    let Some((front, _)) = line.split_once(unit) else { return 0 };
    front.split_whitespace().next_back().and_then(|n| n.parse().ok()).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_log_of_ptxas_is_read_kernel_by_kernel() {
        let log = "ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function 'one' for 'sm_80'
ptxas info    : Function properties for one
ptxas         .     8 bytes stack frame, 12 bytes spill stores, 16 bytes spill loads
ptxas info    : Used 48 registers, used 1 barriers, 32 bytes smem, 408 bytes cmem[0]
ptxas info    : Compile time = 3.7 ms
ptxas info    : Compiling entry function 'two' for 'sm_80'
ptxas info    : Function properties for two
ptxas         .     0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 12 registers, used 0 barriers";
        let one =
            Usage { name: "one".into(), registers: 48, stack_bytes: 8, spill_bytes: 28, shared_bytes: 32 };
        let two = Usage { name: "two".into(), registers: 12, ..Usage::default() };
        assert_eq!(usages(log), [one, two]);
    }
}
