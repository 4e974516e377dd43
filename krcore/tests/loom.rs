//! The ring under every order of memory accesses that the model allows, with loom's atomics in place
//! of the processor's.
#![allow(
    dead_code,
    unreachable_pub,
    clippy::unwrap_used,
    missing_docs,
    reason = "the crate's own file, of which this uses a part"
)]

mod sync {
    pub(crate) use loom::sync::atomic::{AtomicU32, AtomicU64, Ordering};
}
#[path = "../src/ring.rs"]
mod ring;

use loom::sync::Arc;
use ring::{Consumer, Producer, Ring};
use sync::{AtomicU32, AtomicU64};

const SLOTS: usize = 2;
const WIDTH: usize = 2;

struct Memory {
    head: AtomicU32,
    tail: AtomicU32,
    words: [AtomicU64; SLOTS * WIDTH],
}

impl Memory {
    fn new() -> Arc<Self> {
        Arc::new(Self {
            head: AtomicU32::new(0),
            tail: AtomicU32::new(0),
            words: std::array::from_fn(|_| AtomicU64::new(0)),
        })
    }

    fn ring(&self) -> Ring<'_> {
        Ring {
            head: &self.head,
            tail: &self.tail,
            words: &self.words,
            width: WIDTH,
        }
    }
}

/// What is consumed is what was produced, in order, whole, and once: with more entries than slots,
/// so that slots are used again.
#[test]
fn entries_arrive_whole_in_order_and_once() {
    loom::model(|| {
        let memory = Memory::new();
        let theirs = Arc::clone(&memory);
        let producer = loom::thread::spawn(move || {
            let mut producer = Producer::default();
            let mut next = 1;
            while next <= 3 {
                if producer.write(&theirs.ring(), [next, next * 10]).unwrap() {
                    producer.publish(&theirs.ring());
                    next += 1;
                } else {
                    loom::thread::yield_now();
                }
            }
        });
        let mut consumer = Consumer::default();
        let mut expected = 1;
        while expected <= 3 {
            let mut out = [0; WIDTH];
            if consumer.read(&memory.ring(), &mut out).unwrap() {
                consumer.release(&memory.ring());
                assert_eq!(out, [expected, expected * 10]);
                expected += 1;
            } else {
                loom::thread::yield_now();
            }
        }
        producer.join().unwrap();
        assert!(!consumer.has_next(&memory.ring()).unwrap());
    });
}

/// The control: a producer that publishes before it writes is caught.
#[test]
#[should_panic(expected = "torn")]
fn a_producer_that_publishes_too_early_is_caught() {
    loom::model(|| {
        let memory = Memory::new();
        let theirs = Arc::clone(&memory);
        let producer = loom::thread::spawn(move || {
            theirs.tail.store(1, sync::Ordering::Release);
            theirs.words[0].store(1, sync::Ordering::Relaxed);
            theirs.words[1].store(10, sync::Ordering::Relaxed);
        });
        let mut out = [0; WIDTH];
        if Consumer::default().read(&memory.ring(), &mut out).unwrap() {
            assert_eq!(out, [1, 10], "torn");
        }
        producer.join().unwrap();
    });
}

/// How a sleeper and its waker agree: whoever says that it sleeps looks again, and whoever adds
/// something looks whether somebody sleeps. One of the two sees the other.
#[test]
fn a_sleeper_is_woken_or_sees_what_has_come() {
    loom::model(|| {
        let memory = Memory::new();
        let asleep = Arc::new(AtomicU32::new(0));
        let (theirs, their_asleep) = (Arc::clone(&memory), Arc::clone(&asleep));
        let waker = loom::thread::spawn(move || {
            theirs.tail.store(1, sync::Ordering::Release);
            loom::sync::atomic::fence(sync::Ordering::SeqCst);
            their_asleep.load(sync::Ordering::SeqCst) != 0
        });
        asleep.store(1, sync::Ordering::SeqCst);
        loom::sync::atomic::fence(sync::Ordering::SeqCst);
        let seen = Consumer::default().has_next(&memory.ring()).unwrap();
        let woken = waker.join().unwrap();
        assert!(seen || woken, "it would sleep for ever");
    });
}

#[test]
fn an_index_that_cannot_be_true_is_an_error() {
    loom::model(|| {
        let memory = Memory::new();
        memory.tail.store(3, sync::Ordering::Release);
        let mut out = [0; WIDTH];
        assert!(Consumer::default().read(&memory.ring(), &mut out).is_err());
        memory.tail.store(u32::MAX, sync::Ordering::Release);
        assert!(Consumer::default().has_next(&memory.ring()).is_err());
        memory.head.store(1, sync::Ordering::Release);
        assert!(Producer::default().look(&memory.ring()).is_err());
    });
}
