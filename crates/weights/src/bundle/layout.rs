//! How a bundle stores matrices.

use crate::TensorMeta;

/// A way of storing matrices other than row by row: as those who compute with them want them, so that they can be read
/// straight into place. A bundle gives everyone else the rows back.
///
/// What a layout does is known to the room that computes; this one is handed it when a bundle is written or opened.
#[derive(Debug)]
pub struct Layout {
    /// As the manifest calls it. Another arrangement of the bytes is another name.
    pub name: &'static str,
    /// Bytes that a tensor takes; `None` if this layout does not apply to it.
    pub bytes: fn(&TensorMeta) -> Option<usize>,
    /// Rows in the tensor's format → the layout.
    pub pack: fn(&TensorMeta, &[u8]) -> Vec<u8>,
    /// The inverse, byte for byte.
    pub unpack: fn(&TensorMeta, &[u8]) -> Vec<u8>,
}

/// The layout called `name` among those known.
pub(super) fn by_name(known: &'static [Layout], name: &str) -> Option<&'static Layout> {
    known.iter().find(|layout| layout.name == name)
}
