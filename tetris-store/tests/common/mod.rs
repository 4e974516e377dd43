//! What the tests of the store share: models made in memory, and stores that go away.
#![allow(dead_code, unreachable_pub, reason = "each test file uses some of it")]
#![allow(clippy::unwrap_used, reason = "a test says what went wrong by failing")]

use carlsbad_types::{DType, Shape};
use tempfile::TempDir;
use tetris_store::{
    ElementType, Error, ModelSource, Result, Sidecar, SourceFormat, SourceTensor, Store,
    StoreConfig,
};

/// A model in memory.
#[derive(Debug, Clone, Default)]
pub struct MemoryModel {
    tensors: Vec<SourceTensor>,
    bytes: Vec<Vec<u8>>,
    pub sidecars: Vec<Sidecar>,
}

impl MemoryModel {
    /// Adds a tensor.
    pub fn with(mut self, name: &str, dtype: DType, shape: &[usize], bytes: Vec<u8>) -> Self {
        assert_eq!(
            Shape::from(shape).byte_size(dtype).unwrap().get(),
            bytes.len() as u64
        );
        self.tensors.push(SourceTensor {
            name: name.to_owned(),
            element: ElementType::Plain(dtype),
            shape: Shape::from(shape),
            len: bytes.len() as u64,
        });
        self.bytes.push(bytes);
        self
    }

    /// Adds a tensor of `len` bytes that follow from `seed`.
    pub fn with_random(self, name: &str, len: usize, seed: u64) -> Self {
        self.with(name, DType::U8, &[len], random_bytes(len, seed))
    }

    /// The bytes of the tensor called `name`.
    pub fn bytes_of(&self, name: &str) -> &[u8] {
        let index = self.tensors.iter().position(|t| t.name == name).unwrap();
        &self.bytes[index]
    }

    /// Fails unless `store` gives back every tensor, byte by byte.
    pub fn check(&self, store: &Store, model: &tetris_store::ModelId) {
        let shared = store.attach(model).unwrap();
        assert_eq!(shared.manifest().tensors.len(), self.tensors.len());
        for (tensor, bytes) in self.tensors.iter().zip(&self.bytes) {
            let found = shared.tensor(&tensor.name).unwrap();
            assert_eq!(found.entry.element, tensor.element);
            assert_eq!(found.entry.shape, tensor.shape);
            assert!(found.bytes == &bytes[..], "{} differs", tensor.name);
            assert_eq!(
                found.bytes.as_ptr() as usize % tensor.element.alignment(),
                0
            );
        }
    }
}

impl ModelSource for MemoryModel {
    fn format(&self) -> SourceFormat {
        SourceFormat::Safetensors
    }
    fn tensors(&self) -> &[SourceTensor] {
        &self.tensors
    }
    fn read_at(&self, index: usize, offset: u64, into: &mut [u8]) -> Result<()> {
        let offset = offset as usize;
        match self.bytes[index].get(offset..offset + into.len()) {
            Some(bytes) => into.copy_from_slice(bytes),
            None => {
                return Err(Error::Io {
                    what: "read",
                    path: "memory".into(),
                    source: std::io::ErrorKind::UnexpectedEof.into(),
                });
            }
        }
        Ok(())
    }
    fn sidecars(&self) -> Result<Vec<Sidecar>> {
        Ok(self.sidecars.clone())
    }
}

/// `len` bytes that follow from `seed` (SplitMix64).
pub fn random_bytes(len: usize, seed: u64) -> Vec<u8> {
    let mut state = seed;
    let mut bytes = Vec::with_capacity(len + 8);
    while bytes.len() < len {
        state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = state;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        bytes.extend_from_slice(&(z ^ (z >> 31)).to_le_bytes());
    }
    bytes.truncate(len);
    bytes
}

/// A directory on the machine's tmpfs that goes away with the returned value.
pub fn scratch() -> TempDir {
    tempfile::Builder::new()
        .prefix("tetris-test-")
        .tempdir_in("/dev/shm")
        .unwrap()
}

/// A new store with the defaults.
pub fn store() -> (TempDir, Store) {
    let dir = scratch();
    let store = Store::open(StoreConfig::at(dir.path().join("store"))).unwrap();
    (dir, store)
}
