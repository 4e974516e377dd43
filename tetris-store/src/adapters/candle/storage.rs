//! candle's element types, and its storage made from blocks and from bytes.

use std::alloc::Layout;
use std::fs::File;
use std::io;
use std::mem::ManuallyDrop;
use std::os::unix::fs::FileExt;
use std::slice;

use candle_core::{CpuStorage, DType, WithDType};

use crate::element::ElementType;

/// What a stored element type is to candle.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum CandleType {
    /// The same bytes mean the same.
    Same(DType),
    /// `u16`, which candle's own loader widens to `u32`.
    Widened,
    /// candle has no such type.
    None,
}

impl CandleType {
    pub(super) fn of(element: ElementType) -> Self {
        use carlsbad_types::DType as Stored;
        let ElementType::Plain(stored) = element else {
            return Self::None;
        };
        match stored {
            Stored::U8 => Self::Same(DType::U8),
            Stored::U32 => Self::Same(DType::U32),
            Stored::I16 => Self::Same(DType::I16),
            Stored::I32 => Self::Same(DType::I32),
            Stored::I64 => Self::Same(DType::I64),
            Stored::BF16 => Self::Same(DType::BF16),
            Stored::F16 => Self::Same(DType::F16),
            Stored::F32 => Self::Same(DType::F32),
            Stored::F64 => Self::Same(DType::F64),
            Stored::F8E4M3 => Self::Same(DType::F8E4M3),
            Stored::U16 => Self::Widened,
            _ => Self::None,
        }
    }
}

/// Work that is written once for all element types.
trait PerType {
    type Output;
    /// `make` turns a `Vec` of this type into candle's storage.
    fn run<T: WithDType>(self, make: fn(Vec<T>) -> CpuStorage) -> Self::Output;
}

/// Does `work` for the type of `dtype`. `None` for the types that candle has no CPU code for.
fn for_type<W: PerType>(dtype: DType, work: W) -> Option<W::Output> {
    Some(match dtype {
        DType::U8 => work.run(CpuStorage::U8),
        DType::U32 => work.run(CpuStorage::U32),
        DType::I16 => work.run(CpuStorage::I16),
        DType::I32 => work.run(CpuStorage::I32),
        DType::I64 => work.run(CpuStorage::I64),
        DType::BF16 => work.run(CpuStorage::BF16),
        DType::F16 => work.run(CpuStorage::F16),
        DType::F32 => work.run(CpuStorage::F32),
        DType::F64 => work.run(CpuStorage::F64),
        DType::F8E4M3 => work.run(CpuStorage::F8E4M3),
        _ => return None,
    })
}

/// The layout of the memory of a `Vec` with exactly `elements` elements of this type.
pub(super) fn vec_layout(dtype: DType, elements: usize) -> Option<Layout> {
    struct OfVec(usize);
    impl PerType for OfVec {
        type Output = Option<Layout>;
        fn run<T: WithDType>(self, _: fn(Vec<T>) -> CpuStorage) -> Option<Layout> {
            Layout::array::<T>(self.0).ok()
        }
    }
    for_type(dtype, OfVec(elements)).flatten()
}

/// Storage with a copy of `file` from `offset` on.
///
/// # Errors
/// What reading gives; `Unsupported` for a type that candle has no CPU code for.
pub(super) fn read(
    dtype: DType,
    elements: usize,
    file: &File,
    offset: u64,
) -> io::Result<CpuStorage> {
    struct Read<'a>(usize, &'a File, u64);
    impl PerType for Read<'_> {
        type Output = io::Result<CpuStorage>;
        fn run<T: WithDType>(self, make: fn(Vec<T>) -> CpuStorage) -> io::Result<CpuStorage> {
            let Self(elements, file, offset) = self;
            let mut elements = vec![T::from_f64(0.0); elements];
            let (start, len) = (elements.as_mut_ptr(), size_of_val(elements.as_slice()));
            // SAFETY: the bytes are those of `elements`, which is borrowed until they are read, and
            // any bytes are values of a number.
            let bytes = unsafe { slice::from_raw_parts_mut(start.cast::<u8>(), len) };
            file.read_exact_at(bytes, offset)?;
            Ok(make(elements))
        }
    }
    for_type(dtype, Read(elements, file, offset))
        .unwrap_or_else(|| Err(io::ErrorKind::Unsupported.into()))
}

/// A block of memory from `std::alloc::alloc`, given back when dropped.
#[derive(Debug)]
pub(super) struct Block {
    start: *mut u8,
    layout: Layout,
}

impl Block {
    /// # Safety
    /// `start` comes from `std::alloc::alloc(layout)` and belongs to the caller.
    pub(super) unsafe fn new(start: *mut u8, layout: Layout) -> Self {
        Self { start, layout }
    }

    /// Makes it the memory of a candle tensor; gives it back where the layout is another.
    ///
    /// # Safety
    /// The whole block is initialised.
    pub(super) unsafe fn into_storage(self, dtype: DType, elements: usize) -> Option<CpuStorage> {
        struct Adopt(Block, usize);
        impl PerType for Adopt {
            type Output = Option<CpuStorage>;
            fn run<T: WithDType>(self, make: fn(Vec<T>) -> CpuStorage) -> Option<CpuStorage> {
                let Self(block, elements) = self;
                if Layout::array::<T>(elements) != Ok(block.layout) {
                    return None;
                }
                let start = ManuallyDrop::new(block).start.cast::<T>();
                // SAFETY: the block came from the global allocator with the layout of this Vec's
                // memory; `into_storage`'s caller says it is initialised, and any bytes are values
                // of a number.
                Some(make(unsafe {
                    Vec::from_raw_parts(start, elements, elements)
                }))
            }
        }
        for_type(dtype, Adopt(self, elements)).flatten()
    }
}

impl Drop for Block {
    fn drop(&mut self) {
        // SAFETY: `new`'s caller gave the block over, and it was not given on.
        unsafe { std::alloc::dealloc(self.start, self.layout) }
    }
}
