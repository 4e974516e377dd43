//! What was shared, what was copied, and why.

use std::fmt;

use candle_core::DType;
use carlsbad_types::ByteSize;

/// Why a tensor is this process's own copy.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum CopyReason {
    /// [`MapAlloc`](super::MapAlloc) is not the program's `#[global_allocator]`.
    NotRegistered,
    /// An allocator around [`MapAlloc`](super::MapAlloc) changes what it is asked for, or hands out
    /// other addresses than it gets.
    Tainted,
    /// The process may not have the address space: `RLIMIT_AS`, `vm.max_map_count`, a thousand
    /// models at once; or something else lies at 42 TiB, where shared tensors would.
    NoVa,
    /// In its file, the tensor does not begin at a multiple of its element's size.
    Unaligned,
    /// It has no elements, so there is nothing to share.
    Empty,
    /// The model asked for another element type than the stored one, or candle has none for the
    /// stored one and widens it.
    Converted {
        /// The type after conversion.
        to: DType,
    },
    /// The model asked for the tensor on a device with memory of its own.
    OtherDevice,
}

impl fmt::Display for CopyReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NotRegistered => {
                f.write_str("MapAlloc is not the #[global_allocator] of this program")
            }
            Self::Tainted => f.write_str("another allocator is wrapped around MapAlloc"),
            Self::NoVa => f.write_str(
                "no address space: see RLIMIT_AS, vm.max_map_count, and what the program maps at 42 TiB",
            ),
            Self::Unaligned => f.write_str("not aligned to its element in the stored file"),
            Self::Empty => f.write_str("it has no elements"),
            Self::Converted { to } => write!(f, "converted to {}", to.as_str()),
            Self::OtherDevice => f.write_str("moved to a device with memory of its own"),
        }
    }
}

/// One tensor that this process holds a copy of.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Copied {
    /// Its name in the model.
    pub name: String,
    /// Bytes of the copy.
    pub bytes: ByteSize,
    /// Why it could not be shared.
    pub reason: CopyReason,
}

/// What became of a model's tensors in this process.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct LoadReport {
    /// Tensors that are the store's own pages.
    pub mapped: usize,
    /// Bytes in them.
    pub mapped_bytes: ByteSize,
    /// Tensors that are copies, in the order in which they were made. A conversion stands here once
    /// for every time the model asked for it.
    pub copied: Vec<Copied>,
}

impl LoadReport {
    /// Bytes of all copies.
    pub fn copied_bytes(&self) -> ByteSize {
        self.copied.iter().map(|copy| copy.bytes).sum()
    }
}

impl fmt::Display for LoadReport {
    /// One line: what is shared, what is copied, and the first reason.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} tensors shared ({})", self.mapped, self.mapped_bytes)?;
        if let Some(first) = self.copied.first() {
            let (count, bytes) = (self.copied.len(), self.copied_bytes());
            write!(
                f,
                ", {count} copied ({bytes}), the first because: {}",
                first.reason
            )?;
        }
        Ok(())
    }
}
