use crate::Tier;

/// Why bytes were refused, or a size was not understood.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// The tier's budget does not hold that many more bytes.
    #[error("{tier} tier: needs {needed} bytes, {free} free")]
    OverBudget {
        /// Where.
        tier: Tier,
        /// Bytes asked for.
        needed: u64,
        /// Bytes left.
        free: u64,
    },
    /// Not a size.
    #[error("size `{text}`: {why}; write bytes, or a number with KiB, MiB, GiB or TiB, as in `600MiB`")]
    Size {
        /// As the user wrote it.
        text: String,
        /// What is wrong with it.
        why: &'static str,
    },
    /// Not a budget.
    #[error("memory budget `{text}`: {why}; write `2GiB` or `device=600MiB,host=1GiB`")]
    Budget {
        /// As the user wrote it.
        text: String,
        /// What is wrong with it.
        why: String,
    },
}
