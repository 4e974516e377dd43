//! What the fuzz targets share.

use std::fs::File;
use std::io::{Seek, Write};
use std::path::Path;

use tetris_store::ModelSource;

/// `bytes` as a file in memory.
pub fn file_of(bytes: &[u8]) -> File {
    let flags = nix::sys::memfd::MFdFlags::MFD_CLOEXEC;
    let mut file: File = nix::sys::memfd::memfd_create("fuzz", flags).unwrap().into();
    file.write_all(bytes).unwrap();
    file.rewind().unwrap();
    file
}

/// The name of a file that has none.
pub fn nowhere() -> &'static Path {
    Path::new("fuzz")
}

/// Reads all that a source offers. `held` is what its files have, so that nothing may be larger.
pub fn use_all(source: &dyn ModelSource, held: usize) {
    let mut names = std::collections::HashSet::new();
    for (index, tensor) in source.tensors().iter().enumerate() {
        assert!(names.insert(&tensor.name) && !tensor.name.is_empty());
        let size = tensor.element.byte_size(&tensor.shape).unwrap().get();
        assert_eq!(size, tensor.len);
        // A varint of one byte may stand for eight.
        assert!(size <= 8 * held as u64);
        let mut bytes = vec![0; size as usize];
        source.read_at(index, 0, &mut bytes).unwrap();
        bytes.push(0);
        source.read_at(index, 0, &mut bytes).unwrap_err();
    }
    let kept: usize = source
        .sidecars()
        .unwrap()
        .iter()
        .map(|sidecar| sidecar.bytes.len())
        .sum();
    assert!(kept <= 8 * held + 64);
}
