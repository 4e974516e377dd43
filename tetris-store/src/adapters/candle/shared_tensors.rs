//! A model of the store as candle tensors.

use std::collections::HashMap;
use std::ffi::c_void;
use std::fs::File;
use std::io;
use std::num::NonZeroUsize;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::ptr::{self, NonNull};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use candle_core::op::BackpropOp;
use candle_core::{CpuStorage, DType, Storage, Tensor};
use carlsbad_types::ByteSize;
use nix::errno::Errno;
use nix::libc::off_t;
use nix::sys::mman::{MapFlags, MmapAdvise, ProtFlags, madvise, mmap};

use super::map_alloc::Placing;
use super::region_plan::{FileMap, RegionPlan};
use super::report::{Copied, CopyReason, LoadReport};
use super::storage::{self, Block, CandleType};
use super::window::{Region, page_size};
use crate::attach::SharedModel;
use crate::element::ElementType;
use crate::error::{Error, Result};
use crate::id::ObjectId;
use crate::manifest::TensorEntry;

/// The tensors of one attached model. Clones, and all tensors got from them, are the same memory.
///
/// With [`MapAlloc`](super::MapAlloc) as the program's global allocator, tensors are the store's
/// pages: loading takes system calls, not copying. Without it, or where sharing is not possible,
/// they are copies, and [`report`](Self::report) says which and why. The model stays leased until
/// the last shared tensor is dropped, wherever in the program it is by then.
///
/// A tensor may be changed in place (`slice_set`, `zero_set`, `const_set`): the change is this
/// process's own, on pages copied as they are written to. The stored bytes stay as they are.
#[derive(Debug, Clone)]
pub struct SharedTensors(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    tensors: HashMap<String, std::result::Result<Tensor, ElementType>>,
    /// Addresses that the shared tensors occupy.
    region: Option<(usize, usize)>,
    report: Mutex<LoadReport>,
}

/// What [`SharedTensors`] needs to know of a model.
pub(super) trait TensorFiles {
    /// Its tensors.
    fn entries(&self) -> &[TensorEntry];
    /// The stored file `object`, for reading.
    fn open(&self, object: &ObjectId) -> Result<File>;
    /// A descriptor whose closing gives up the lease.
    fn lease(&self) -> Result<Option<OwnedFd>>;
}

impl SharedTensors {
    /// Makes candle tensors of an attached model. The model itself is not needed any more after
    /// this: the tensors keep its lease.
    ///
    /// # Errors
    /// [`Error::Damaged`], [`Error::BadShape`] and [`Error::Io`] where a stored file is not what the
    /// manifest says or cannot be opened or read.
    pub fn of(model: &SharedModel) -> Result<Self> {
        Self::load(model)
    }

    pub(super) fn load(files: &dyn TensorFiles) -> Result<Self> {
        let entries = files.entries();
        let types: Vec<_> = entries
            .iter()
            .map(|entry| CandleType::of(entry.element))
            .collect();
        let elements = entries
            .iter()
            .map(elements_of)
            .collect::<Result<Vec<_>>>()?;
        let mut loader = Loader {
            files,
            open: None,
            report: LoadReport::default(),
        };

        let (blocks, region) = match loader.map(&types, &elements)? {
            Ok(mapped) => (mapped.blocks, Some((mapped.region, mapped.len))),
            Err(reason) => (entries.iter().map(|_| Err(reason)).collect(), None),
        };
        let mut tensors = HashMap::with_capacity(entries.len());
        for (i, block) in blocks.into_iter().enumerate() {
            let entry = &entries[i];
            let tensor = match types[i] {
                CandleType::None => Err(entry.element),
                CandleType::Widened => Ok(loader.widen(entry, elements[i])?),
                CandleType::Same(dtype) => Ok(loader.tensor(entry, dtype, elements[i], block)?),
            };
            tensors.insert(entry.name.clone(), tensor);
        }
        Ok(Self(Arc::new(Inner {
            tensors,
            region: region.map(|(region, len)| (region.start(), len)),
            report: Mutex::new(loader.report),
        })))
    }

    /// The tensor called `name`, as it is stored. Every call gives the same memory.
    pub fn get(&self, name: &str) -> Option<Tensor> {
        self.0.tensors.get(name)?.as_ref().ok().cloned()
    }

    /// Tensor `name`, or the stored type that candle has no counterpart for.
    pub(super) fn lookup(&self, name: &str) -> Option<std::result::Result<&Tensor, ElementType>> {
        self.0
            .tensors
            .get(name)
            .map(|tensor| tensor.as_ref().map_err(|element| *element))
    }

    /// What is shared and what is copied, up to now.
    pub fn report(&self) -> LoadReport {
        self.lock_report().clone()
    }

    pub(super) fn add_copy(&self, name: &str, tensor: &Tensor, reason: CopyReason) {
        let bytes = tensor.elem_count() * tensor.dtype().size_in_bytes();
        self.lock_report().copied.push(Copied {
            name: name.to_owned(),
            bytes: ByteSize::new(bytes as u64),
            reason,
        });
    }

    fn lock_report(&self) -> MutexGuard<'_, LoadReport> {
        self.0.report.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Maps every page now, instead of one fault at a time in the first inference. Copies nothing:
    /// this is `MADV_POPULATE_READ`, where `MAP_POPULATE` or `mlock` would make all pages private.
    ///
    /// # Errors
    /// [`Error::Io`] before Linux 5.14, which has no such advice.
    pub fn prefault(&self) -> Result<()> {
        let Some((start, len)) = self.0.region else {
            return Ok(());
        };
        let Some(address) = NonNull::new(ptr::with_exposed_provenance_mut::<c_void>(start)) else {
            return Ok(());
        };
        // SAFETY: the tensors in `self` keep the region mapped, and reading it changes nothing.
        unsafe { madvise(address, len, MmapAdvise::MADV_POPULATE_READ) }
            .map_err(Error::io("map the pages of", "the shared tensors"))
    }
}

/// Elements of a tensor whose size agrees with its type and shape.
fn elements_of(entry: &TensorEntry) -> Result<usize> {
    let bad = |why| Error::BadShape {
        element: entry.element.name(),
        shape: entry.shape.clone(),
        why,
    };
    if entry.element.byte_size(&entry.shape)?.get() != entry.len {
        return Err(bad("the manifest gives another size"));
    }
    entry
        .shape
        .elements()
        .ok_or_else(|| bad("more elements than 64 bits can count"))
}

impl TensorFiles for SharedModel {
    fn entries(&self) -> &[TensorEntry] {
        &self.manifest().tensors
    }
    fn open(&self, object: &ObjectId) -> Result<File> {
        self.open_object(object)
    }
    fn lease(&self) -> Result<Option<OwnedFd>> {
        self.share_lease()
    }
}

/// Blocks with a model's bytes in them, one for each tensor that can have one.
struct Mapped {
    blocks: Vec<std::result::Result<Block, CopyReason>>,
    region: Region,
    len: usize,
}

struct Loader<'a> {
    files: &'a dyn TensorFiles,
    /// The object read from last: small tensors of one pack follow each other.
    open: Option<(ObjectId, File)>,
    report: LoadReport,
}

impl Loader<'_> {
    /// Blocks over the files' bytes for every tensor that can have one. The inner error is the
    /// reason why none can.
    fn map(
        &self,
        types: &[CandleType],
        elements: &[usize],
    ) -> Result<std::result::Result<Mapped, CopyReason>> {
        let entries = self.files.entries();
        let layouts: Vec<_> = (types.iter().zip(elements))
            .map(|(&candle, &elements)| match candle {
                CandleType::Same(dtype) => storage::vec_layout(dtype, elements),
                _ => None,
            })
            .collect();
        let plan = RegionPlan::new(entries, page_size(), &layouts);
        if plan.maps.is_empty() {
            return Ok(Err(CopyReason::Empty));
        }
        let Ok(region) = Region::claim(plan.len, plan.maps.len()) else {
            return Ok(Err(CopyReason::NoVa));
        };
        let placing = Placing::start();
        let mut blocks = Vec::with_capacity(entries.len());
        for (place, layout) in plan.places.iter().zip(layouts) {
            blocks.push(match (*place, layout) {
                (Ok(offset), Some(layout)) => {
                    // SAFETY: the plan puts each tensor at a place of its own in the region.
                    match unsafe { placing.place(region.start() + offset, layout) } {
                        // SAFETY: `place` gives what `alloc` gave for this layout.
                        Ok(start) => Ok(unsafe { Block::new(start, layout) }),
                        // Somebody else may hold a block here: nothing is mapped over the region.
                        Err(reason) => return Ok(Err(reason)),
                    }
                }
                (Err(reason), _) => Err(reason),
                (Ok(_), None) => Err(CopyReason::Empty),
            });
        }
        drop(placing);
        for map in &plan.maps {
            match self.map_file(&region, map)? {
                Ok(()) => {}
                Err(Errno::ENOMEM | Errno::EAGAIN) => return Ok(Err(CopyReason::NoVa)),
                Err(errno) => return Err(Error::io("map", object_path(&map.object))(errno)),
            }
        }
        if let Some(lease) = self.files.lease()? {
            region.hold(lease);
        }
        let len = plan.len;
        Ok(Ok(Mapped {
            blocks,
            region,
            len,
        }))
    }

    /// Puts a stretch of a file in the place of anonymous memory that blocks of ours lie in.
    fn map_file(&self, region: &Region, map: &FileMap) -> Result<nix::Result<()>> {
        let file = self.files.open(&map.object)?;
        let size = file
            .metadata()
            .map_err(Error::io("measure", object_path(&map.object)))?
            .len();
        if size < map.file_offset.saturating_add(map.len as u64) {
            return Err(Error::Damaged {
                path: object_path(&map.object),
                why: "it ends before a tensor does".to_owned(),
            });
        }
        let (Some(len), Ok(offset)) =
            (NonZeroUsize::new(map.len), off_t::try_from(map.file_offset))
        else {
            return Ok(Err(Errno::EINVAL));
        };
        // Private: a write is this process's own. Writable: candle's safe in-place operations
        // write. Not populated: that would copy every page of a private writable mapping.
        // SAFETY: the region is ours, and every block in it is held by the caller and has not been
        // read or written. To the language this is foreign code writing through addresses that
        // `place` exposed. The file is one the store never changes.
        let mapped = unsafe {
            mmap(
                NonZeroUsize::new(region.start() + map.region_offset),
                len,
                ProtFlags::PROT_READ | ProtFlags::PROT_WRITE,
                MapFlags::MAP_PRIVATE | MapFlags::MAP_FIXED | MapFlags::MAP_NORESERVE,
                &file,
                offset,
            )
        };
        Ok(mapped.map(drop))
    }

    fn tensor(
        &mut self,
        entry: &TensorEntry,
        dtype: DType,
        elements: usize,
        block: std::result::Result<Block, CopyReason>,
    ) -> Result<Tensor> {
        let reason = match block {
            Ok(block) => {
                // SAFETY: the file's bytes are mapped over the whole block.
                if let Some(storage) = unsafe { block.into_storage(dtype, elements) } {
                    self.report.mapped += 1;
                    self.report.mapped_bytes += ByteSize::new(entry.len);
                    return Ok(tensor_of(storage, entry));
                }
                CopyReason::Unaligned
            }
            Err(reason) => reason,
        };
        let storage = self.read(entry, dtype, elements)?;
        self.copied(entry, entry.len, reason);
        Ok(tensor_of(storage, entry))
    }

    /// `u16` as `u32`, which is what candle's own loader does.
    fn widen(&mut self, entry: &TensorEntry, elements: usize) -> Result<Tensor> {
        let narrow = match self.read(entry, DType::I16, elements)? {
            CpuStorage::I16(narrow) => narrow,
            _ => Vec::new(),
        };
        let wide: Vec<u32> = narrow
            .into_iter()
            .map(|bits| u32::from(bits as u16))
            .collect();
        let reason = CopyReason::Converted { to: DType::U32 };
        self.copied(entry, 2 * entry.len, reason);
        Ok(tensor_of(CpuStorage::U32(wide), entry))
    }

    fn read(&mut self, entry: &TensorEntry, dtype: DType, elements: usize) -> Result<CpuStorage> {
        if self
            .open
            .as_ref()
            .is_none_or(|(object, _)| *object != entry.object)
        {
            self.open = Some((entry.object, self.files.open(&entry.object)?));
        }
        match &self.open {
            Some((_, file)) => storage::read(dtype, elements, file, entry.offset),
            None => Err(io::ErrorKind::NotFound.into()),
        }
        .map_err(Error::io("read", object_path(&entry.object)))
    }

    fn copied(&mut self, entry: &TensorEntry, bytes: u64, reason: CopyReason) {
        self.report.copied.push(Copied {
            name: entry.name.clone(),
            bytes: ByteSize::new(bytes),
            reason,
        });
    }
}

fn tensor_of(storage: CpuStorage, entry: &TensorEntry) -> Tensor {
    Tensor::from_storage(
        Storage::Cpu(storage),
        entry.shape.dims(),
        BackpropOp::none(),
        false,
    )
}

/// How an object is called in messages.
fn object_path(object: &ObjectId) -> PathBuf {
    PathBuf::from(format!("object {object:.16}"))
}
