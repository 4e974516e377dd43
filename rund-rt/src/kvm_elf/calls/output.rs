//! Output that the owner collects: kept until there is a message's worth, or the guest ends.

use std::fmt;

use super::account::Output;

/// How much is kept before it is sent.
const CHUNK: usize = 32 << 10;

/// Takes what a guest wrote to stream 1 or 2.
/// Says whether it did.
pub type Sink = Box<dyn FnMut(u8, &[u8]) -> bool>;

/// The captured streams of a guest process.
pub struct Outputs {
    kept: [Vec<u8>; 2],
    /// How much room there is for all processes of the sandbox.
    account: &'static Output,
    sink: Sink,
}

impl fmt::Debug for Outputs {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Outputs")
            .field("account", &self.account)
            .finish_non_exhaustive()
    }
}

impl Outputs {
    /// Nothing yet.
    pub fn new(account: &'static Output, sink: Sink) -> Self {
        Self {
            kept: [Vec::new(), Vec::new()],
            account,
            sink,
        }
    }

    /// Keeps what a guest wrote.
    pub fn take(&mut self, stream: u8, bytes: &[u8]) {
        let room = self.account.take(bytes.len() as u64) as usize;
        let taken = &bytes[..bytes.len().min(room)];
        let kept = &mut self.kept[usize::from(stream == 2)];
        kept.extend_from_slice(taken);
        if kept.len() >= CHUNK {
            self.flush();
        }
    }

    /// Sends what is kept.
    pub fn flush(&mut self) {
        for (stream, kept) in [1, 2].into_iter().zip(&mut self.kept) {
            for chunk in kept.chunks(CHUNK) {
                if !(self.sink)(stream, chunk) {
                    self.account.lost(chunk.len() as u64);
                }
            }
            kept.clear();
        }
    }

    /// What is kept, instead of sending it.
    pub fn kept(&mut self) -> [Vec<u8>; 2] {
        std::mem::take(&mut self.kept)
    }
}
