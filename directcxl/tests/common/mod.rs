//! What the tests share.
#![allow(dead_code, reason = "each test uses its own part")]
#![allow(clippy::unwrap_used, reason = "a test says what went wrong by failing")]

pub(crate) mod caches;

use carlsbad_types::ByteSize;
use directcxl::backend::Backend;
use directcxl::{FileHdm, FormatOptions, HostId, MemfdHdm, Namespace, Pool};
use tempfile::TempDir;

/// An extent.
pub(crate) const MIB2: ByteSize = ByteSize::mib(2);

/// Memory with room for so many extents beside the metadata of one host.
pub(crate) fn memory(extents: u64) -> MemfdHdm {
    MemfdHdm::new(ByteSize::mib(2 * (extents + 2))).unwrap()
}

/// A pool in memory, and a way to open its memory again as a host.
pub(crate) fn pool(extents: u64) -> (Pool, impl Fn(u16) -> MemfdHdm) {
    pool_of(extents, 1)
}

/// A pool in memory for several hosts.
pub(crate) fn pool_of(extents: u64, hosts: u16) -> (Pool, impl Fn(u16) -> MemfdHdm) {
    let memory = MemfdHdm::new(ByteSize::mib(2 * (extents + 1 + u64::from(hosts)))).unwrap();
    let fd = memory.as_fd().try_clone_to_owned().unwrap();
    let options = FormatOptions {
        hosts,
        ..FormatOptions::default()
    };
    let pool = Pool::format(memory, options).unwrap();
    let again = move |host| {
        MemfdHdm::from_fd(fd.try_clone().unwrap())
            .unwrap()
            .on_host(HostId(host))
    };
    (pool, again)
}

/// A pool in a file called `pool` on tmpfs.
pub(crate) fn file_pool(extents: u64) -> (Pool, TempDir) {
    let dir = carlsbad_kit::scratch::on_tmpfs().unwrap();
    let length = ByteSize::mib(2 * (extents + 2));
    let file = FileHdm::create(dir.path().join("pool"), length).unwrap();
    let pool = Pool::format(file, FormatOptions::default()).unwrap();
    (pool, dir)
}

/// Writes `byte` at both ends, and what follows from it between.
pub(crate) fn fill(namespace: &Namespace, byte: u8) {
    let length = namespace.length().get();
    for at in (0..length).step_by(4096) {
        namespace.write(at, &[byte; 64]).unwrap();
    }
    namespace.write(length - 1, &[byte]).unwrap();
}

/// The byte that [`fill`] wrote, if it is everywhere.
pub(crate) fn sum(namespace: &Namespace) -> u8 {
    let length = namespace.length().get();
    let mut first = [0];
    namespace.read(0, &mut first).unwrap();
    for at in (0..length).step_by(4096) {
        let mut bytes = [0; 64];
        namespace.read(at, &mut bytes).unwrap();
        assert_eq!(bytes, [first[0]; 64], "at {at}");
    }
    first[0]
}
