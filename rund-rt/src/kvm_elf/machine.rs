//! A virtual machine with one processor, and the guest's memory in it.

use kvm_bindings::{
    CpuId, KVM_MAX_CPUID_ENTRIES, Msrs, kvm_msr_entry, kvm_regs, kvm_sregs, kvm_sync_regs,
    kvm_userspace_memory_region, kvm_xcr, kvm_xcrs, kvm_xsave,
};
use kvm_ioctls::{Cap, Kvm, SyncReg, VcpuExit, VcpuFd, VmFd};
use nix::errno::Errno;

use super::cpu;
use super::memory::GuestMemory;
use super::shim::{self, CALL_PORT, EXCEPTION_PORT, Return};

/// What the kernel's KVM offers, asked once.
#[derive(Debug)]
pub struct Host {
    kvm: Kvm,
    cpuid: CpuId,
    /// The part of XCR0 that guests get.
    pub xcr0: u64,
    tsc_khz: std::cell::OnceCell<Option<u32>>,
}

/// Why KVM refused something.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Refusal {
    /// What was asked of it.
    pub what: &'static str,
    /// Its answer.
    pub why: Errno,
}

impl std::fmt::Display for Refusal {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "KVM cannot {}: {}", self.what, self.why.desc())
    }
}

fn refused(what: &'static str) -> impl Fn(kvm_ioctls::Error) -> Refusal {
    move |why| Refusal {
        what,
        why: Errno::from_raw(why.errno()),
    }
}

impl Host {
    /// Opens `/dev/kvm`.
    ///
    /// # Errors
    /// Where it is absent, closed to this user, or lacks what is needed.
    pub fn open() -> Result<Self, Refusal> {
        let kvm = Kvm::new().map_err(refused("open /dev/kvm"))?;
        if !kvm.check_extension(Cap::UserMemory) || !kvm.check_extension(Cap::SyncRegs) {
            return Err(Refusal {
                what: "synchronise registers",
                why: Errno::ENOSYS,
            });
        }
        let cpuid = kvm
            .get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
            .map_err(refused("describe the processor"))?;
        let xcr0 = cpuid
            .as_slice()
            .iter()
            .find(|entry| entry.function == 0xd && entry.index == 0)
            .map_or(3, |entry| u64::from(entry.eax) & cpu::XCR0);
        Ok(Self {
            kvm,
            cpuid,
            xcr0,
            tsc_khz: std::cell::OnceCell::new(),
        })
    }

    /// Number, offset and size of the extended parts of an area of vectors.
    pub fn vector_parts(&self) -> Vec<(u32, usize, usize)> {
        let parts = self.cpuid.as_slice().iter();
        parts
            .filter(|entry| entry.function == 0xd && (2..63).contains(&entry.index))
            .filter(|entry| entry.eax != 0 && entry.ebx != 0)
            .map(|entry| (entry.index, entry.ebx as usize, entry.eax as usize))
            .collect()
    }

    /// Feature bits of leaf 1, edx.
    pub fn features(&self) -> u32 {
        let leaf = self.cpuid.as_slice().iter().find(|e| e.function == 1);
        leaf.map_or(0, |entry| entry.edx)
    }

    /// Frequency of the time stamp counter in kHz, asked once.
    pub fn tsc_khz(&self, machine: &Machine) -> Option<u32> {
        *self.tsc_khz.get_or_init(|| machine.tsc_khz())
    }

    /// A text that is the same on processors on which a template can be cloned: vendor, family,
    /// features, and the part of XCR0.
    pub fn processor(&self) -> String {
        use std::fmt::Write as _;
        let mut text = format!("xcr0={:x}", self.xcr0);
        for entry in self.cpuid.as_slice() {
            // Leaf 1's ebx holds the number of the processor it was asked on.
            let (function, index) = (entry.function, entry.index);
            let parts = match (function, index) {
                (0, _) => [entry.ebx, entry.ecx, entry.edx, 0],
                (1, _) => [entry.eax, entry.ecx, entry.edx, 0],
                (7, 0 | 1) => [entry.eax, entry.ebx, entry.ecx, entry.edx],
                (0x8000_0001, _) => [0, 0, entry.ecx, entry.edx],
                _ => continue,
            };
            let _infallible = write!(text, " {function:x}.{index:x}={parts:x?}");
        }
        text
    }
}

/// A machine.
#[derive(Debug)]
pub struct Machine {
    // In this order: the processor goes before its machine.
    vcpu: VcpuFd,
    vm: VmFd,
    /// Segments, tables and control registers as a program finds them.
    first_sregs: kvm_sregs,
}

/// Words of the area in which vectors are saved; XCR0 leaves out what needs more.
pub const XSAVE_WORDS: usize = 1024;

/// Why a machine was left.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Stop {
    /// The guest made a system call.
    Call,
    /// The guest raised this exception.
    Exception(u8),
    /// The guest used a port that is none of the above.
    Port,
    /// A signal came for this thread.
    Interrupted,
    /// It cannot go on.
    Broken(String),
}

/// All that a processor holds and a guest could have changed, or that makes it what it is.
#[derive(Clone, serde::Serialize, serde::Deserialize)]
pub struct Registers {
    /// General registers.
    pub regs: kvm_regs,
    /// Segments, tables, control registers.
    pub sregs: kvm_sregs,
    /// Vector and floating point registers.
    pub xsave: Vec<u32>,
    /// Model-specific registers that are not the same everywhere.
    pub msrs: Vec<(u32, u64)>,
    /// XCR0.
    pub xcr0: u64,
}

impl std::fmt::Debug for Registers {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Registers")
            .field("rip", &self.regs.rip)
            .finish_non_exhaustive()
    }
}

/// The model-specific registers that are saved and compared: those of system calls, of segment
/// bases, and the page attributes.
pub const SAVED_MSRS: [u32; 9] = [
    cpu::MSR_STAR,
    cpu::MSR_LSTAR,
    cpu::MSR_SFMASK,
    0xc000_0083, // CSTAR
    0xc000_0102, // kernel GS base
    0x174,       // SYSENTER_CS
    0x175,       // SYSENTER_ESP
    0x176,       // SYSENTER_EIP
    0x277,       // PAT
];

fn give_memory(vm: &VmFd, memory: &GuestMemory) -> Result<(), Refusal> {
    let region = kvm_userspace_memory_region {
        slot: 0,
        flags: 0,
        guest_phys_addr: 0,
        memory_size: memory.len(),
        userspace_addr: memory.host_address(),
    };
    // SAFETY: the memory outlives the machine, by the order of fields in `Guest`, and only this
    // thread and its guest use it.
    unsafe { vm.set_user_memory_region(region) }.map_err(refused("give memory"))
}

impl Machine {
    /// A machine with `memory`, whose processor is in long mode at user privilege.
    ///
    /// # Errors
    /// What KVM refused.
    pub fn new(
        host: &Host,
        memory: &GuestMemory,
        root: u64,
        way_back: Return,
    ) -> Result<Self, Refusal> {
        let vm = loop {
            match host.kvm.create_vm() {
                // A signal came in between.
                Err(why) if why.errno() == Errno::EINTR as i32 => {}
                other => break other.map_err(refused("make a machine"))?,
            }
        };
        give_memory(&vm, memory)?;
        let vcpu = vm.create_vcpu(0).map_err(refused("make a processor"))?;
        vcpu.set_cpuid2(&host.cpuid)
            .map_err(refused("describe the processor to the guest"))?;
        let mut sregs = vcpu.get_sregs().map_err(refused("read registers"))?;
        cpu::set_system_registers(&mut sregs, root);
        vcpu.set_sregs(&sregs)
            .map_err(refused("set the system registers"))?;
        let mut machine = Self {
            vcpu,
            vm,
            first_sregs: sregs,
        };
        machine.set_xcr0(host.xcr0)?;
        machine.set_msrs(&[
            (cpu::MSR_STAR, cpu::STAR),
            (cpu::MSR_LSTAR, shim::entry(way_back)),
            (cpu::MSR_SFMASK, cpu::masked_flags(way_back)),
        ])?;
        machine.vcpu.set_sync_valid_reg(SyncReg::Register);
        Ok(machine)
    }

    /// Takes the memory away, so that other pages can be put in its place: with it goes all that
    /// KVM has made of the page tables in it.
    ///
    /// # Errors
    /// What KVM refused.
    pub fn take_memory(&self) -> Result<(), Refusal> {
        let none = kvm_userspace_memory_region::default();
        // SAFETY: a slot of size 0 is none.
        unsafe { self.vm.set_user_memory_region(none) }.map_err(refused("take memory"))
    }

    /// Gives it `memory` again.
    ///
    /// # Errors
    /// What KVM refused.
    pub fn give_memory(&self, memory: &GuestMemory) -> Result<(), Refusal> {
        give_memory(&self.vm, memory)
    }

    /// A processor that is about to begin a program whose page tables hang on `root`.
    ///
    /// # Errors
    /// What KVM refused.
    pub fn begin_again(&mut self, root: u64) -> Result<(), Refusal> {
        let mut sregs = self.first_sregs;
        sregs.cr3 = root;
        self.set_vectors(&cpu::first_vectors())?;
        let synchronised = self.vcpu.sync_regs_mut();
        synchronised.regs = kvm_regs::default();
        synchronised.sregs = sregs;
        self.vcpu.set_sync_dirty_reg(SyncReg::SystemRegister);
        Ok(())
    }

    /// Runs the guest until it leaves the machine.
    pub fn run(&mut self) -> Stop {
        self.vcpu.set_sync_dirty_reg(SyncReg::Register);
        match self.vcpu.run() {
            Ok(VcpuExit::IoOut(CALL_PORT, _)) => Stop::Call,
            Ok(VcpuExit::IoOut(port, _))
                if (EXCEPTION_PORT..EXCEPTION_PORT + 32).contains(&port) =>
            {
                Stop::Exception((port - EXCEPTION_PORT) as u8)
            }
            Ok(VcpuExit::Shutdown) => Stop::Exception(8),
            Ok(VcpuExit::IoIn(..) | VcpuExit::IoOut(..)) => {
                self.complete();
                Stop::Port
            }
            Ok(VcpuExit::Intr) => Stop::Interrupted,
            Ok(other) => Stop::Broken(format!("it was left by {other:?}")),
            Err(why) if [Errno::EINTR, Errno::EAGAIN].contains(&Errno::from_raw(why.errno())) => {
                Stop::Interrupted
            }
            Err(why) => Stop::Broken(format!("KVM cannot run it: {why}")),
        }
    }

    /// The guest's general registers, as of the last time it stopped.
    pub fn regs(&mut self) -> &mut kvm_regs {
        let synchronised: &mut kvm_sync_regs = self.vcpu.sync_regs_mut();
        &mut synchronised.regs
    }

    /// Where a signal handler writes 1 so that the guest does not begin to run.
    pub fn immediate_exit(&mut self) -> *mut u8 {
        &raw mut self.vcpu.get_kvm_run().immediate_exit
    }

    /// Segments, tables and control registers.
    ///
    /// # Errors
    /// What KVM refused.
    pub fn sregs(&self) -> Result<kvm_sregs, Refusal> {
        self.vcpu.get_sregs().map_err(refused("read registers"))
    }

    /// Sets them.
    ///
    /// # Errors
    /// What KVM refused.
    pub fn set_sregs(&self, sregs: &kvm_sregs) -> Result<(), Refusal> {
        self.vcpu.set_sregs(sregs).map_err(refused("set registers"))
    }

    /// Frequency of the time stamp counter in kHz.
    pub fn tsc_khz(&self) -> Option<u32> {
        self.vcpu.get_tsc_khz().ok().filter(|khz| *khz > 0)
    }

    /// Back from an exception handler's privilege to the guest's.
    ///
    /// # Errors
    /// What KVM refused.
    pub fn to_user_mode(&self) -> Result<(), Refusal> {
        let mut sregs = self.sregs()?;
        cpu::set_user_mode(&mut sregs);
        self.set_sregs(&sregs)
    }

    fn set_xcr0(&mut self, value: u64) -> Result<(), Refusal> {
        let mut xcrs = kvm_xcrs {
            nr_xcrs: 1,
            ..Default::default()
        };
        xcrs.xcrs[0] = kvm_xcr {
            xcr: 0,
            reserved: 0,
            value,
        };
        self.vcpu.set_xcrs(&xcrs).map_err(refused("set XCR0"))
    }

    fn set_msrs(&self, values: &[(u32, u64)]) -> Result<(), Refusal> {
        let entries: Vec<_> = values
            .iter()
            .map(|(index, data)| kvm_msr_entry {
                index: *index,
                data: *data,
                ..Default::default()
            })
            .collect();
        let msrs = Msrs::from_entries(&entries).map_err(|_| Refusal {
            what: "set so many registers",
            why: Errno::E2BIG,
        })?;
        match self.vcpu.set_msrs(&msrs) {
            Ok(set) if set == values.len() => Ok(()),
            Ok(_) => Err(Refusal {
                what: "set a model-specific register",
                why: Errno::EINVAL,
            }),
            Err(why) => Err(refused("set model-specific registers")(why)),
        }
    }

    /// All that the processor holds.
    ///
    /// # Errors
    /// What KVM refused.
    pub fn save(&mut self) -> Result<Registers, Refusal> {
        let regs = self.vcpu.get_regs().map_err(refused("read registers"))?;
        let xsave = self.vcpu.get_xsave().map_err(refused("read the vectors"))?;
        let xcrs = self.vcpu.get_xcrs().map_err(refused("read XCR0"))?;
        Ok(Registers {
            regs,
            sregs: self.sregs()?,
            xsave: xsave.region.to_vec(),
            msrs: self.msrs()?,
            xcr0: xcrs.xcrs[0].value,
        })
    }

    fn set_vectors(&self, region: &[u32; XSAVE_WORDS]) -> Result<(), Refusal> {
        let xsave = kvm_xsave {
            region: cpu::legacy_written_out(region),
            ..Default::default()
        };
        // SAFETY: the processor was given no more state than fits into this structure: XCR0 leaves
        // out what needs more.
        unsafe { self.vcpu.set_xsave(&xsave) }.map_err(refused("set the vectors"))
    }

    /// What [`Self::restore`] needs: what a guest at user privilege can change.
    ///
    /// # Errors
    /// What KVM refused.
    pub fn save_program(&mut self) -> Result<Registers, Refusal> {
        let xsave = self.vcpu.get_xsave().map_err(refused("read the vectors"))?;
        Ok(Registers {
            regs: *self.regs(),
            sregs: self.sregs()?,
            xsave: xsave.region.to_vec(),
            msrs: Vec::new(),
            xcr0: 0,
        })
    }

    fn msrs(&self) -> Result<Vec<(u32, u64)>, Refusal> {
        let mut found = Vec::new();
        // One at a time: a kernel stops at the first that it does not have.
        for index in SAVED_MSRS {
            let entry = kvm_msr_entry {
                index,
                ..Default::default()
            };
            let Ok(mut msrs) = Msrs::from_entries(&[entry]) else {
                continue;
            };
            if self.vcpu.get_msrs(&mut msrs).is_ok_and(|got| got == 1) {
                found.extend(msrs.as_slice().iter().map(|one| (one.index, one.data)));
            }
        }
        Ok(found)
    }

    /// Ends what the last exit has left half done, so that registers can be set.
    pub fn complete(&mut self) {
        self.vcpu.set_kvm_immediate_exit(1);
        let _interrupted = self.run();
        self.vcpu.set_kvm_immediate_exit(0);
    }

    /// Puts back what a guest at user privilege can change: general registers, segments with their
    /// bases, vectors. What it cannot (control registers, XCR0, model-specific registers) is as it
    /// was made.
    ///
    /// # Errors
    /// What KVM refused.
    pub fn restore(&mut self, saved: &Registers) -> Result<(), Refusal> {
        let region = saved.xsave.as_slice().try_into().map_err(|_| Refusal {
            what: "set vectors of this size",
            why: Errno::EINVAL,
        })?;
        self.set_vectors(&region)?;
        let synchronised = self.vcpu.sync_regs_mut();
        synchronised.regs = saved.regs;
        synchronised.sregs = saved.sregs;
        self.vcpu.set_sync_dirty_reg(SyncReg::SystemRegister);
        Ok(())
    }
}
