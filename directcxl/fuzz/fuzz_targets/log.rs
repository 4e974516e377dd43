#![no_main]

//! Operations in a log whose crc is right, and which say anything.

use carlsbad_types::ByteSize;
use directcxl::layout::{ARENAS, EXTENT, Entry, Extent, HALF, Operation, Superblock};
use directcxl::medium::{Access, Medium};
use directcxl::{Backend, FormatOptions, MemfdHdm, NamespaceOptions, Pool, Role};
use libfuzzer_sys::fuzz_target;
use std::sync::Arc;

fn superblock(backend: &Arc<dyn Backend>) -> (Box<dyn Medium>, Superblock) {
    let medium = Arc::clone(backend)
        .map(0..2 * EXTENT, Access::Write, false)
        .unwrap();
    let mut bytes = [0; Superblock::SIZE];
    medium.load(0, &mut bytes).unwrap();
    let directcxl::layout::Found::Valid(superblock) = Superblock::decode(&bytes) else {
        panic!("it was formatted");
    };
    (medium, superblock)
}

fuzz_target!(|steps: Vec<(u8, u8, u8, u8)>| {
    let backend: Arc<dyn Backend> = Arc::new(MemfdHdm::new(ByteSize::mib(32)).unwrap());
    let options = FormatOptions {
        entries: 64,
        ..FormatOptions::default()
    };
    drop(Pool::format_shared(backend.reopen().unwrap(), options).unwrap());
    let (medium, superblock) = superblock(&backend);
    for (i, (kind, generation, offset, length)) in steps.iter().take(64).enumerate() {
        let generation = u64::from(*generation) << (kind >> 4);
        let extent = Extent {
            offset: u64::from(*offset) * EXTENT / 2,
            length: u64::from(*length) * EXTENT / 2,
        };
        let operation = match kind % 6 {
            0 => Operation::Create {
                generation,
                extent,
                name: format!("n{}", kind >> 4).into(),
            },
            1 => Operation::Remove { generation },
            2 => Operation::Free { generation, extent },
            3 => Operation::Resize { generation, extent },
            4 => Operation::Quarantined { generation, extent },
            _ => Operation::Evict {
                host: u16::from(*offset),
                nonce: generation,
            },
        };
        let entry = Entry {
            sequence: 1 + i as u64,
            epoch: 1,
            turn: 1,
            operation,
        };
        let half = entry.encode(superblock.seed());
        let at = superblock.entry(0, 1, i as u64);
        assert!(at >= EXTENT + ARENAS);
        medium.store(at, &half).unwrap();
        medium.store(at + HALF, &half).unwrap();
    }
    for role in [Role::Reader, Role::Writer(directcxl::Epoch::CURRENT)] {
        if let Ok(pool) = Pool::open_shared(backend.reopen().unwrap(), role) {
            let infos = pool.list().unwrap();
            let mut end = superblock.data_start();
            let mut sorted = infos.clone();
            sorted.sort_by_key(|info| info.offset);
            for info in sorted {
                assert!(info.offset >= end, "namespaces overlap");
                end = info.offset + info.length.get();
                assert!(end <= superblock.length);
            }
            if role != Role::Reader {
                let _made = pool.create("fresh", ByteSize::mib(2), NamespaceOptions::default());
                assert!(pool.check().is_ok());
            }
        }
    }
});
