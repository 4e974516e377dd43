//! What programs do often: attach, resolve, read, publish, allocate.
#![allow(
    clippy::unwrap_used,
    missing_docs,
    reason = "a bench says what went wrong by failing"
)]

use carlsbad_types::ByteSize;
use criterion::{Criterion, criterion_group, criterion_main};
use directcxl::backend::Coherence;
use directcxl::heap::{Heap, HeapOptions};
use directcxl::{FormatOptions, MemfdHdm, NamespaceOptions, Pool};

fn pool(coherence: Coherence) -> Pool {
    let memory = MemfdHdm::new(ByteSize::mib(64))
        .unwrap()
        .coherence(coherence);
    Pool::format(memory, FormatOptions::default()).unwrap()
}

fn namespaces(c: &mut Criterion) {
    let pool = pool(Coherence::Hardware);
    let a = pool
        .create("a", ByteSize::mib(2), NamespaceOptions::default())
        .unwrap();
    let handle = a.handle();
    c.bench_function("attach what is attached", |b| {
        b.iter(|| pool.attach("a").unwrap());
    });
    c.bench_function("resolve a handle", |b| {
        b.iter(|| pool.resolve(handle).unwrap());
    });
    drop(a);
    c.bench_function("attach and detach", |b| {
        b.iter(|| pool.attach("a").unwrap());
    });
    c.bench_function("list", |b| {
        b.iter(|| pool.list().unwrap());
    });
}

fn bytes(c: &mut Criterion) {
    let pool = pool(Coherence::Software);
    let a = pool
        .create("a", ByteSize::mib(2), NamespaceOptions::default())
        .unwrap();
    let mut buffer = vec![0; 1 << 20];
    for length in [8, 64, 4096, 1 << 20] {
        c.bench_function(&format!("guarded read of {length} B"), |b| {
            b.iter(|| a.read(0, &mut buffer[..length]).unwrap());
        });
    }
    for length in [64u64, 4096] {
        c.bench_function(&format!("write and publish {length} B"), |b| {
            b.iter(|| {
                a.write(0, &buffer[..length as usize]).unwrap();
                a.publish(0..length).unwrap();
            });
        });
    }
}

fn heap(c: &mut Criterion) {
    let pool = pool(Coherence::Hardware);
    let a = pool
        .create("a", ByteSize::mib(32), NamespaceOptions::default())
        .unwrap();
    let heap = Heap::format(&a, HeapOptions::default()).unwrap();
    c.bench_function("allocate and free 256 B", |b| {
        b.iter(|| {
            let place = heap.allocate(ByteSize::new(256)).unwrap();
            heap.free(place).unwrap();
        });
    });
}

criterion_group!(all, namespaces, bytes, heap);
criterion_main!(all);
