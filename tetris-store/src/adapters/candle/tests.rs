//! The adapter over files made by hand, below the store.

use std::fs::{self, File};
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;
use std::path::Path;

use candle_core::{DType, Device, Tensor};
use carlsbad_types::{ByteSize, DType as Stored, Shape};
use tempfile::TempDir;

use super::shared_tensors::TensorFiles;
use super::{CopyReason, MapAlloc, SharedTensors, window};
use crate::element::{BlockType, ElementType};
use crate::error::{Error, Result};
use crate::id::{Domain, ObjectId, TensorId};
use crate::manifest::TensorEntry;

// Every unit test of the crate allocates through it.
#[global_allocator]
static ALLOCATOR: MapAlloc = MapAlloc::system();

struct Files {
    dir: TempDir,
    entries: Vec<TensorEntry>,
    lease: bool,
}

impl Files {
    fn new() -> Self {
        Self {
            dir: carlsbad_kit::scratch::on_tmpfs().unwrap(),
            entries: Vec::new(),
            lease: false,
        }
    }

    fn object(number: usize) -> ObjectId {
        format!("{number:064x}").parse().unwrap()
    }

    fn path(&self, object: &ObjectId) -> std::path::PathBuf {
        self.dir.path().join(object.to_string())
    }

    /// A tensor in object `number` from byte `offset` on, filled with a pattern of its own.
    fn add(
        &mut self,
        name: &str,
        number: usize,
        element: ElementType,
        offset: u64,
        dims: &[usize],
    ) {
        let shape = Shape::from(dims);
        let len = element.byte_size(&shape).unwrap().get();
        let object = Self::object(number);
        let file = File::options()
            .create(true)
            .truncate(false)
            .write(true)
            .open(self.path(&object))
            .unwrap();
        let bytes: Vec<u8> = (0..len).map(|i| ((i + offset) % 61) as u8).collect();
        file.write_all_at(&bytes, offset).unwrap();
        self.entries.push(TensorEntry {
            name: name.to_owned(),
            element,
            id: TensorId::of(&Domain::default(), element, &shape, &bytes),
            shape,
            object,
            offset,
            len,
        });
    }

    /// What candle makes of the same bytes by copying.
    fn expected(&self, name: &str) -> Tensor {
        let entry = self
            .entries
            .iter()
            .find(|entry| entry.name == name)
            .unwrap();
        let all = fs::read(self.path(&entry.object)).unwrap();
        let bytes = if entry.len == 0 {
            &[]
        } else {
            &all[entry.offset as usize..][..entry.len as usize]
        };
        let super::storage::CandleType::Same(dtype) = super::storage::CandleType::of(entry.element)
        else {
            panic!("no candle type")
        };
        Tensor::from_raw_buffer(bytes, dtype, entry.shape.dims(), &Device::Cpu).unwrap()
    }
}

impl TensorFiles for Files {
    fn entries(&self) -> &[TensorEntry] {
        &self.entries
    }
    fn open(&self, object: &ObjectId) -> Result<File> {
        let path = self.path(object);
        File::open(&path).map_err(Error::io("open", path))
    }
    fn lease(&self) -> Result<Option<OwnedFd>> {
        Ok(self
            .lease
            .then(|| File::open(self.dir.path()).unwrap().into()))
    }
}

fn plain(dtype: Stored) -> ElementType {
    ElementType::Plain(dtype)
}

fn bits(tensor: &Tensor) -> Vec<u8> {
    let mut bytes = Vec::new();
    tensor.write_bytes(&mut bytes).unwrap();
    bytes
}

/// Whether the process has `path` open.
fn has_open(path: &Path) -> bool {
    fs::read_dir("/proc/self/fd")
        .unwrap()
        .any(|fd| fd.is_ok_and(|fd| fs::read_link(fd.path()).is_ok_and(|target| target == path)))
}

/// Whether the process maps `path`.
fn maps(path: &Path) -> bool {
    fs::read_to_string("/proc/self/maps")
        .unwrap()
        .contains(path.to_str().unwrap())
}

fn every_type() -> Files {
    let mut files = Files::new();
    let types = [
        Stored::F32,
        Stored::F64,
        Stored::F16,
        Stored::BF16,
        Stored::U8,
        Stored::U32,
        Stored::I16,
        Stored::I32,
        Stored::I64,
        Stored::F8E4M3,
    ];
    for (i, dtype) in types.into_iter().enumerate() {
        files.add(
            &format!("pack.{dtype}"),
            0,
            plain(dtype),
            4096 + 800 * i as u64,
            &[3, 5],
        );
        files.add(
            &format!("own.{dtype}"),
            1 + i,
            plain(dtype),
            4096,
            &[70, 300],
        );
    }
    files
}

#[test]
fn every_element_type_is_shared_and_equal_to_a_copy() {
    let files = every_type();
    let tensors = SharedTensors::load(&files).unwrap();
    tensors.prefault().unwrap();
    let report = tensors.report();
    assert_eq!(report.copied, []);
    assert_eq!(report.mapped, 20);
    assert_eq!(
        report.mapped_bytes,
        files
            .entries
            .iter()
            .map(|entry| ByteSize::new(entry.len))
            .sum()
    );
    for entry in &files.entries {
        let shared = tensors.get(&entry.name).unwrap();
        let expected = files.expected(&entry.name);
        assert_eq!(shared.dtype(), expected.dtype());
        assert_eq!(shared.dims(), expected.dims());
        assert_eq!(bits(&shared), bits(&expected), "{}", entry.name);
    }
}

#[test]
fn dropping_all_tensors_releases_region_and_lease() {
    let mut files = Files::new();
    files.lease = true;
    for i in 0..10 {
        files.add(&format!("t{i}"), i, plain(Stored::F32), 4096, &[1000, 20]);
    }
    let tensors = SharedTensors::load(&files).unwrap();
    let last = tensors.get("t7").unwrap();
    let derived = last.narrow(0, 10, 5).unwrap();
    assert!(maps(files.dir.path()) && has_open(files.dir.path()));
    drop(tensors);
    assert!(has_open(files.dir.path()), "a tensor is alive");
    drop(last);
    assert!(has_open(files.dir.path()), "a view of a tensor is alive");
    assert_eq!(derived.to_vec2::<f32>().unwrap().len(), 5);
    std::thread::spawn(move || drop(derived)).join().unwrap();
    assert!(!has_open(files.dir.path()));
    assert!(!maps(files.dir.path()));
}

#[test]
fn in_place_changes_stay_in_this_attach() {
    let mut files = Files::new();
    files.add("w", 1, plain(Stored::F32), 4096, &[100, 100]);
    files.add("v", 1, plain(Stored::F32), 4096, &[100, 100]);
    let before = fs::read(files.path(&Files::object(1))).unwrap();
    let original = files.expected("w");
    let (one, other) = (
        SharedTensors::load(&files).unwrap(),
        SharedTensors::load(&files).unwrap(),
    );
    assert_eq!(one.report().copied, []);
    let changed = one.get("w").unwrap();
    let patch = Tensor::ones((2, 100), DType::F32, &Device::Cpu).unwrap();
    changed.slice_set(&patch, 0, 50).unwrap();
    changed.narrow(0, 0, 10).unwrap().zero_set().unwrap();
    changed
        .narrow(0, 99, 1)
        .unwrap()
        .const_set(candle_core::scalar::Scalar::F32(7.0))
        .unwrap();
    let rows = changed.to_vec2::<f32>().unwrap();
    assert_eq!((rows[0][0], rows[50][3], rows[99][99]), (0.0, 1.0, 7.0));
    // Repeated `get` shares storage, so the change shows there; the tied weight has its own.
    assert_eq!(bits(&one.get("w").unwrap()), bits(&changed));
    assert_eq!(bits(&one.get("v").unwrap()), bits(&original));
    assert_eq!(bits(&other.get("w").unwrap()), bits(&original));
    assert_eq!(fs::read(files.path(&Files::object(1))).unwrap(), before);
}

#[test]
fn what_cannot_be_shared_is_copied_with_its_reason() {
    let mut files = Files::new();
    files.add("odd", 1, plain(Stored::F32), 4097, &[3]);
    files.add("none", 2, plain(Stored::F32), 4096, &[3, 0]);
    files.add("scalar", 3, plain(Stored::F64), 4096, &[]);
    files.add("u16", 4, plain(Stored::U16), 4096, &[2]);
    files.add("bool", 5, plain(Stored::Bool), 4096, &[2]);
    files.add("block", 6, ElementType::Block(BlockType::Q8_0), 4096, &[32]);
    let tensors = SharedTensors::load(&files).unwrap();
    let reasons: Vec<_> = (tensors.report().copied.into_iter())
        .map(|copied| (copied.name, copied.bytes.get(), copied.reason))
        .collect();
    assert_eq!(
        reasons,
        [
            ("odd".into(), 12, CopyReason::Unaligned),
            ("none".into(), 0, CopyReason::Empty),
            ("u16".into(), 8, CopyReason::Converted { to: DType::U32 }),
        ]
    );
    assert_eq!(tensors.report().mapped, 1);
    for name in ["odd", "none", "scalar"] {
        assert_eq!(
            bits(&tensors.get(name).unwrap()),
            bits(&files.expected(name))
        );
    }
    assert_eq!(
        tensors.get("u16").unwrap().to_vec1::<u32>().unwrap(),
        [0x0A09, 0x0C0B]
    );
    let builder = tensors.var_builder(DType::F32);
    for name in ["bool", "block"] {
        assert!(tensors.get(name).is_none());
        assert!(builder.contains_tensor(name));
        let message = builder.get_unchecked(name).unwrap_err().to_string();
        assert!(message.contains("candle has no type for"), "{message}");
    }
}

#[test]
fn a_builder_checks_shapes_converts_and_reports() {
    let mut files = Files::new();
    files.add("a.w", 1, plain(Stored::F16), 4096, &[4, 8]);
    let tensors = SharedTensors::load(&files).unwrap();
    let builder = tensors.var_builder(DType::F32).pp("a");
    assert!(builder.get((8, 4), "w").is_err());
    assert!(builder.get((4, 8), "b").is_err());
    let converted = tensors
        .var_builder(DType::F32)
        .pp("a")
        .get((4, 8), "w")
        .unwrap();
    let expected = files.expected("a.w").to_dtype(DType::F32).unwrap();
    assert_eq!(bits(&converted), bits(&expected));
    let report = tensors.report();
    let last = report.copied.last().unwrap();
    assert_eq!(last.reason, CopyReason::Converted { to: DType::F32 });
    assert_eq!(last.bytes, ByteSize::new(4 * 8 * 4));
    assert!(report.to_string().contains("converted to f32"), "{report}");
}

#[test]
fn a_missing_or_short_object_is_an_error_and_leaves_nothing() {
    let mut files = Files::new();
    files.lease = true;
    files.add("whole", 1, plain(Stored::F32), 4096, &[5000]);
    files.add("short", 2, plain(Stored::F32), 4096, &[5000]);
    let path = files.path(&Files::object(2));
    File::options()
        .write(true)
        .open(&path)
        .unwrap()
        .set_len(8192)
        .unwrap();
    let error = SharedTensors::load(&files).unwrap_err();
    assert!(matches!(error, Error::Damaged { .. }), "{error}");
    fs::remove_file(path).unwrap();
    assert!(SharedTensors::load(&files).is_err());
    assert!(!maps(files.dir.path()) && !has_open(files.dir.path()));
    files.entries.pop();
    let mut wrong = files.entries[0].clone();
    wrong.len -= 4;
    files.entries.push(wrong);
    assert!(matches!(
        SharedTensors::load(&files),
        Err(Error::BadShape { .. })
    ));
}

#[test]
fn a_vec_that_grows_moves_out_of_the_window() {
    let mut files = Files::new();
    files.add("w", 1, plain(Stored::F32), 4096, &[5000]);
    let tensor = SharedTensors::load(&files).unwrap().get("w").unwrap();
    let expected = files.expected("w").to_vec1::<f32>().unwrap();
    // to_vec1 clones; take the Vec itself, which only this test can: by raw parts through storage.
    let (storage, _) = tensor.storage_and_layout();
    let candle_core::Storage::Cpu(candle_core::CpuStorage::F32(own)) = &*storage else {
        panic!("not on the CPU")
    };
    assert!(window::holds(own.as_ptr().addr()));
    // SAFETY: the Vec is read out bitwise, and the tensor it stays in is never dropped.
    let mut own = unsafe { std::ptr::read(own) };
    drop(storage);
    let _never_dropped = std::mem::ManuallyDrop::new(tensor);
    own.push(1.0);
    assert!(!window::holds(own.as_ptr().addr()));
    assert_eq!(own[..5000], expected);
    assert!(!maps(files.dir.path()));
}
