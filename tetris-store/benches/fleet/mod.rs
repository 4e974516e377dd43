//! Several processes that each serve the same model.
#![allow(
    dead_code,
    unreachable_pub,
    reason = "each bench target uses some of it"
)]

use carlsbad_kit::child::{self, Child, Role};
use carlsbad_kit::memory::MemoryUse;
use carlsbad_types::ByteSize;
use serde::{Deserialize, Serialize};
use tetris_store::{ModelId, Store, StoreConfig};

use crate::bert;

#[derive(Debug, Clone, Serialize, Deserialize)]
enum Way {
    /// Attached to the store.
    Sharing { root: String, model: ModelId },
    /// Loaded by candle; and the kernel may merge equal pages.
    Copying { mergeable: bool },
}

/// Plays the role of one process of a fleet, where that is what this process is.
pub fn role() -> bool {
    let Some(way) = child::arguments::<Way>("instance") else {
        return false;
    };
    let config = bert::config();
    let (model, tensors) = match way {
        Way::Sharing { root, model } => {
            let store = Store::open(StoreConfig::at(root)).unwrap();
            let (bert, tensors) = bert::load_shared(&store, &model, &config);
            (bert, Some(tensors))
        }
        Way::Copying { mergeable } => {
            if mergeable {
                // SAFETY: an attribute of this process, without pointers.
                let set = unsafe { nix::libc::prctl(nix::libc::PR_SET_MEMORY_MERGE, 1, 0, 0, 0) };
                assert_eq!(set, 0, "{}", std::io::Error::last_os_error());
            }
            (bert::load_candle(&bert::weights(), &config), None)
        }
    };
    // An inference, and every weight: the copies were written when they were made.
    let answer = bert::infer(&model, &bert::QUESTION).unwrap();
    let touched: f32 = (tensors.iter())
        .flat_map(|tensors| {
            bert::names()
                .into_iter()
                .filter_map(|name| tensors.get(&name))
        })
        .filter(|tensor| tensor.dtype() == candle_core::DType::F32)
        .map(|tensor| tensor.sum_all().unwrap().to_scalar::<f32>().unwrap())
        .sum();
    assert!(touched.is_finite());
    child::tell(format!("ready {}", answer.elem_count()));
    while child::wait_for_parent().is_some() {
        let answer = bert::infer(&model, &bert::QUESTION).unwrap();
        child::tell(format!("again {}", answer.elem_count()));
    }
    true
}

/// Processes that have loaded the model and answered once. They end with it.
#[derive(Debug)]
pub struct Fleet {
    children: Vec<Child>,
    /// What is stored for them, and where.
    store: Option<(String, ByteSize)>,
}

impl Fleet {
    pub fn sharing(processes: usize, store: &Store, model: &ModelId) -> Self {
        let root = store.root().to_str().unwrap().to_owned();
        let way = Way::Sharing {
            root: root.clone(),
            model: *model,
        };
        Self {
            children: start(processes, &way),
            store: Some((root, store.stats().unwrap().stored)),
        }
    }

    pub fn copying(processes: usize) -> Self {
        let way = Way::Copying { mergeable: false };
        Self {
            children: start(processes, &way),
            store: None,
        }
    }

    pub fn mergeable(processes: usize) -> Self {
        let way = Way::Copying { mergeable: true };
        Self {
            children: start(processes, &way),
            store: None,
        }
    }

    pub fn pids(&self) -> impl Iterator<Item = u32> + '_ {
        self.children.iter().map(Child::id)
    }

    /// Memory that exists because of these processes: the sum of their PSS, and what is stored for
    /// them and mapped by none of them. So every byte counts once.
    pub fn memory_mib(&self) -> f64 {
        let mut bytes = MemoryUse::sum(self.pids()).unwrap().pss.get();
        if let Some((root, stored)) = &self.store {
            let of_store = |name: &str| name.starts_with(root.as_str());
            let mapped: u64 = (self.pids())
                .map(|pid| MemoryUse::of_mappings(pid, of_store).unwrap().pss.get())
                .sum();
            bytes += stored.get().saturating_sub(mapped);
        }
        bytes as f64 / f64::from(1 << 20)
    }
}

/// One after another, as instances start when load rises; each has answered before the next.
fn start(processes: usize, way: &Way) -> Vec<Child> {
    (0..processes)
        .map(|_| {
            let child = Role::main("instance").start(way).unwrap();
            child.hear("ready").unwrap();
            child
        })
        .collect()
}
