#![no_main]

use directcxl::layout::{Entry, Found, HALF, Lease, LeaseHead, Record, Seed, Superblock};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: [u8; 128]| {
    // What is taken as a structure survives being written again.
    if let Found::Valid(superblock) = Superblock::decode(&bytes) {
        assert_eq!(
            Superblock::decode(&superblock.encode()),
            Found::Valid(superblock)
        );
        assert!(superblock.data_start() <= superblock.length);
    }
    let seed = Seed::of(0);
    if let Some(record) = bytes[..Record::SIZE]
        .try_into()
        .ok()
        .and_then(|bytes| Record::decode(bytes, seed))
    {
        assert_eq!(Record::decode(&record.encode(seed), seed), Some(record));
    }
    let half: &[u8; HALF as usize] = &bytes;
    if let Some(entry) = Entry::decode(half, seed) {
        assert_eq!(Entry::decode(&entry.encode(seed), seed), Some(entry));
    }
    if let Ok(bytes) = bytes[..LeaseHead::SIZE].try_into() {
        let _head = LeaseHead::decode(bytes, seed);
    }
    if let Ok(bytes) = bytes[..Lease::SIZE].try_into() {
        let _lease = Lease::decode(bytes);
    }
});
