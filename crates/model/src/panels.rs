//! Models on disk whose matrices lie as they are computed with.

use hearth_kernels::PackedMatrix;
use hearth_weights::{Layout, ModelFiles, TensorMeta};
use std::path::Path;

/// What the kernels' panels are called in a bundle. Another arrangement takes another name: bundles that name this one
/// are read as it is now.
pub const PANELS: &str = "panels16";

/// The layouts that a bundle is written in and may be read in.
pub static LAYOUTS: &[Layout] = &[Layout { name: PANELS, bytes, pack, unpack }];

/// Opens a model: a Hugging Face directory, a `.gguf` file, or a bundle in any layout.
///
/// # Errors
/// One sentence naming the file, the thing in it and what to do.
pub fn open(path: &Path) -> Result<ModelFiles, hearth_weights::Error> {
    hearth_weights::open_with(path, LAYOUTS)
}

fn bytes(meta: &TensorMeta) -> Option<usize> {
    match meta.shape[..] {
        [rows, columns]
            if PackedMatrix::has_layout(meta.format.name())
                && columns.is_multiple_of(meta.format.block_len()) =>
        {
            // The shape comes from a file: padded to whole panels it must still have a size.
            rows.checked_add(64)?.checked_mul(columns)?.checked_mul(8)?;
            Some(PackedMatrix::bytes_for(rows, columns, meta.format.name()))
        }
        _ => None,
    }
}

fn pack(meta: &TensorMeta, rows: &[u8]) -> Vec<u8> {
    let packed = PackedMatrix::from_format(meta.shape[0], meta.shape[1], meta.format.name(), rows);
    packed.expect("the bundle checks lengths, and the layout applies").image().to_vec()
}

fn unpack(meta: &TensorMeta, image: &[u8]) -> Vec<u8> {
    let packed = PackedMatrix::from_panels(meta.shape[0], meta.shape[1], meta.format.name(), image);
    packed.expect("the bundle checks lengths, and the layout applies").unpack()
}
