#![no_main]

//! A heap whose state was written over, used all the same.

use carlsbad_types::ByteSize;
use directcxl::heap::{Heap, HeapOptions, Place};
use directcxl::{FormatOptions, MemfdHdm, Namespace, NamespaceOptions, Pool};
use libfuzzer_sys::fuzz_target;
use std::cell::OnceCell;

thread_local! {
    static MEMORY: OnceCell<Namespace> = const { OnceCell::new() };
}

fuzz_target!(|input: (Vec<(u16, u64)>, Vec<(bool, u16)>)| {
    let (damage, steps) = input;
    MEMORY.with(|memory| {
        let namespace = memory.get_or_init(|| {
            let memory = MemfdHdm::new(ByteSize::mib(16)).unwrap();
            let pool = Pool::format(memory, FormatOptions::default()).unwrap();
            pool.create("heap", ByteSize::mib(2), NamespaceOptions::default())
                .unwrap()
        });
        let options = HeapOptions {
            smallest: ByteSize::kib(1),
        };
        let heap = Heap::format(namespace, options).unwrap();
        for i in 0..16 {
            heap.allocate_into(ByteSize::kib(1 << (i % 5)), heap.root(i).unwrap())
                .unwrap();
        }
        for (at, value) in damage.iter().take(64) {
            namespace
                .write(u64::from(*at) / 8 * 8, &value.to_le_bytes())
                .unwrap();
        }
        let Ok(heap) = Heap::open(namespace) else {
            return;
        };
        for (take, n) in steps.iter().take(64) {
            if *take {
                let _taken = heap.allocate(ByteSize::new(u64::from(*n)));
            } else {
                let _freed = heap.free(Place(u64::from(*n) * 64));
            }
        }
        let _stats = heap.check();
    });
});
