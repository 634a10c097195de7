//! An embedding that stays on disk: of its table a step reads its tokens' rows, and nothing else.
//!
//! In a bundle rows lie in panels of sixteen, so a panel is what is read for a token; it is decoded by the kernel that decodes
//! the whole table where that is in memory. Reads pass through one small buffer in host memory.

use crate::error::Error;
use crate::loader::{Part, Weight};
use burn::tensor::Tensor;
use hearth_kernels::{Activations, PackedMatrix};
use hearth_memory::{AlignedBuffer, Charge, Kind, Ledger, NvmeFile, Tier};
use hearth_model::panels::PANELS;
use hearth_model::{Embedding, Group, Matrix, ParamSpec};
use hearth_weights::ModelFiles;
use rayon::prelude::*;
use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError};

/// Rows that lie together.
const PANEL: usize = 16;
/// Tokens whose panels are read at a time.
const AT_A_TIME: usize = 16;

/// Bytes of an embedding that stays on disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TableBytes {
    /// On disk, and what the device would hold.
    pub stored: u64,
    /// Of the buffer in host memory.
    pub staging: u64,
}

/// An embedding that may stay on disk, and where it lies.
pub(crate) struct TablePart {
    pub part: Part,
    range: Range<u64>,
}

impl TablePart {
    /// Takes the embedding out of `outside` if rows can be read of it: it is no head, and lies in the file in panels.
    pub fn take(outside: &mut Vec<Part>, files: &ModelFiles, path: &std::path::Path) -> Option<Self> {
        let of = |group: Group| move |part: &Part| part.spec.group == group;
        let is_table = |part: &Part| of(Group::Embedding)(part) && part.spec.shape.len() == 2;
        let [at] = (0..outside.len()).filter(|i| of(Group::Embedding)(&outside[*i])).collect::<Vec<_>>()[..]
        else {
            return None;
        };
        let part = &outside[at];
        let has_head =
            outside.iter().any(|other| of(Group::Head)(other) && other.spec.shape == part.spec.shape);
        let image = files.tensors.image(&part.spec.name).filter(|image| image.layout == PANELS)?;
        let fits = is_table(part) && has_head && image.place.path == path && {
            let panels = part.spec.shape[0].div_ceil(PANEL) as u64;
            panels * panel_bytes(&part.spec, part.format.name()) == part.bytes
        };
        let range = image.place.range;
        fits.then(|| Self { part: outside.remove(at), range })
    }

    pub fn bytes(&self) -> TableBytes {
        let panels = AT_A_TIME as u64 * panel_bytes(&self.part.spec, self.part.format.name());
        TableBytes { stored: self.part.bytes, staging: AlignedBuffer::capacity_for(panels as usize) as u64 }
    }
}

fn panel_bytes(spec: &ParamSpec, format: &str) -> u64 {
    PackedMatrix::bytes_for(PANEL, spec.shape[1], format) as u64
}

/// Reads rows of an embedding.
pub(crate) struct Table {
    file: NvmeFile,
    /// Of sixteen times [`AT_A_TIME`] rows.
    part: Part,
    start: u64,
    panel: usize,
    buffer: Mutex<Arc<AlignedBuffer>>,
    /// What stays on disk.
    _charge: Charge,
}

impl Table {
    /// Makes the buffer; the bytes on disk and the buffer's are charged.
    ///
    /// # Errors
    /// When a budget does not hold them, or the file cannot be opened.
    pub fn new(table: TablePart, file: &NvmeFile, ledger: &Ledger) -> Result<Self, Error> {
        let TableBytes { stored, .. } = table.bytes();
        let TablePart { mut part, range } = table;
        let panel = panel_bytes(&part.spec, part.format.name()) as usize;
        let charge = ledger.charge(Tier::Nvme, Kind::Weights, stored)?;
        let buffer = AlignedBuffer::charged(ledger, Tier::Host, Kind::Staging, AT_A_TIME * panel)?;
        part.spec.shape[0] = AT_A_TIME * PANEL;
        let file = NvmeFile::open(file.path())?;
        let buffer = Mutex::new(Arc::new(buffer));
        Ok(Self { file, part, start: range.start, panel, buffer, _charge: charge })
    }

    /// Token ids, each below the vocabulary size → `[ids, d_model]`, as `embedding` makes them of its rows.
    ///
    /// # Errors
    /// When rows cannot be read.
    pub fn rows(&self, embedding: &Embedding, ids: &[u32]) -> Result<Tensor<2>, Error> {
        let mut buffer = self.buffer.lock().unwrap_or_else(PoisonError::into_inner);
        let some = ids.chunks(AT_A_TIME).map(|ids| self.some_rows(embedding, ids, &mut buffer));
        Ok(Tensor::cat(some.collect::<Result<Vec<_>, _>>()?, 0))
    }

    fn some_rows(
        &self,
        embedding: &Embedding,
        ids: &[u32],
        buffer: &mut Arc<AlignedBuffer>,
    ) -> Result<Tensor<2>, Error> {
        // Whoever borrowed it last is done: rows are copied out.
        let bytes = Arc::get_mut(buffer).expect("a buffer is lent for the moment of a copy");
        // By several threads: a disk answers many small reads in the time of a few.
        bytes.par_chunks_exact_mut(self.panel).zip(ids).try_for_each(|(place, &id)| {
            self.file.read_at(self.start + (id as usize / PANEL * self.panel) as u64, place)
        })?;
        let local: Vec<u32> =
            ids.iter().zip(0..).map(|(id, k)| k * PANEL as u32 + id % PANEL as u32).collect();
        let lent: Arc<dyn std::ops::Deref<Target = [u8]> + Send + Sync> = buffer.clone();
        let Weight::Matrix(matrix) = self.part.borrow(&lent, 0..AT_A_TIME * self.panel, Activations::F32)
        else {
            unreachable!("a table has two dimensions");
        };
        Ok(embedding.forward_from(&Matrix::Packed(matrix), &local))
    }
}
