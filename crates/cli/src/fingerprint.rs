//! Which weights these are, whatever file they lie in.

use hearth_weights::{Error, ModelFiles};
use sha2::{Digest, Sha256};

/// SHA-256 over shape, constants and every tensor's name, format and bytes, adapter laid over.
///
/// # Errors
/// A tensor that cannot be read.
pub fn fingerprint(files: &ModelFiles) -> Result<String, Error> {
    let mut hash = Sha256::new();
    hash.update(format!("{:?}", files.config));
    for meta in files.tensors.tensors() {
        hash.update(format!("\n{} {} {:?}\n", meta.name, meta.format.name(), meta.shape));
        hash.update(&*files.tensors.bytes(&meta.name)?);
        files.tensors.release(&meta.name);
    }
    Ok(hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect())
}
