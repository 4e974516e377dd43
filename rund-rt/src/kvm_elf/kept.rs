//! What the shim keeps for the guest besides clocks and files: the process' name, its signal
//! handlers, some entropy, a limit. A program asks for most of these once, when it begins, and each
//! question that leaves the machine costs it some 30 µs.
//!
//! The page is the guest's to write. What it says there it could have said by a call.

use super::calls::Kernel;
use super::calls::signal::{ACTION_WORDS, SIGNALS};
use super::guest::fill_random;
use super::layout::STACK;
use super::memory::GuestMemory;
use super::shim::data;

/// Writes all of it into the shim's page, with entropy where `draws` says so.
pub fn publish(memory: &GuestMemory, kernel: &Kernel, draws: bool) {
    memory.set_data(data::STACK_LIMIT, STACK);
    // Of this process alone: what a template had or a parent has is never given out.
    let mut entropy = [0; data::ENTROPY_LEN as usize];
    fill_random(&mut entropy);
    memory.write_data(data::ENTROPY, &entropy);
    let left = if draws { data::ENTROPY_LEN } else { 0 };
    memory.set_data(data::ENTROPY_LEFT, left);
    publish_name(memory, kernel);
    publish_actions(memory, kernel);
}

fn publish_name(memory: &GuestMemory, kernel: &Kernel) {
    memory.write_data(data::NAME, &kernel.name);
}

/// The handlers, where the host has changed one.
pub fn publish_actions(memory: &GuestMemory, kernel: &Kernel) {
    let words = kernel.signals.actions();
    let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
    memory.write_data(data::ACTIONS, &bytes);
    memory.set_data(data::ACTIONS_CHANGED, 0);
}

/// Takes what the guest has changed.
pub fn collect(memory: &GuestMemory, kernel: &mut Kernel) {
    memory.read_data(data::NAME, &mut kernel.name);
    kernel.name[15] = 0;
    if memory.data(data::ACTIONS_CHANGED) != 0 {
        let mut bytes = [0; SIGNALS * ACTION_WORDS * 8];
        memory.read_data(data::ACTIONS, &mut bytes);
        kernel.signals.set_actions(&bytes);
        memory.set_data(data::ACTIONS_CHANGED, 0);
    }
}

/// After the host has served what the shim could not.
pub fn after(memory: &GuestMemory, kernel: &Kernel, number: u64) {
    match i64::try_from(number).unwrap_or(-1) {
        libc::SYS_prctl => publish_name(memory, kernel),
        libc::SYS_rt_sigaction => publish_actions(memory, kernel),
        _ => {}
    }
}

// The page holds all of them.
const _: () = assert!(data::ACTIONS + (SIGNALS * ACTION_WORDS * 8) as u64 <= super::layout::PAGE);
