//! A guest: warms up, then reads a line, and says who it is.

use std::collections::hash_map::RandomState;
use std::hash::{BuildHasher, Hasher};
use std::io::{BufRead, Read, Write};

fn main() {
    let table: Vec<u64> = (0..4096u64).map(|n| n.wrapping_mul(n)).collect();
    let mut line = String::new();
    std::io::stdin().lock().read_line(&mut line).unwrap();
    let mut entropy = [0u8; 16];
    // What has no file in its root has no entropy device either: the sandbox gives it.
    std::fs::File::open("/dev/urandom")
        .and_then(|mut file| file.read_exact(&mut entropy))
        .unwrap();
    let now = std::time::SystemTime::now()
        .duration_since(std::time::UNIX_EPOCH)
        .unwrap();
    let boot = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap();
    let host = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap();
    let hash = RandomState::new().build_hasher().finish();
    let mut out = std::io::stdout().lock();
    writeln!(out, "input {}", line.trim()).unwrap();
    writeln!(out, "entropy {entropy:02x?}").unwrap();
    writeln!(out, "clock {}", now.as_nanos()).unwrap();
    writeln!(out, "pid {}", std::process::id()).unwrap();
    writeln!(out, "boot {}", boot.trim()).unwrap();
    writeln!(out, "host {}", host.trim()).unwrap();
    writeln!(out, "hash {hash:x}").unwrap();
    writeln!(out, "table {}", table.iter().fold(0, |a, b| a ^ b)).unwrap();
}
