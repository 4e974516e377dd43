//! What a zygote gives up before it does anything for anybody, and with it all that it starts:
//! other files (landlock), other system calls (seccomp), root's capabilities, new privileges.

use std::collections::BTreeMap;
use std::os::fd::BorrowedFd;

use landlock::{
    ABI, Access, AccessFs, CompatLevel, Compatible, PathBeneath, Ruleset, RulesetAttr,
    RulesetCreatedAttr, RulesetStatus,
};
use nix::errno::Errno;
use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter,
    SeccompRule, TargetArch,
};

use super::reset::PAGEMAP_SCAN;
use super::wire::Confinement;

/// Gives up all that is not needed.
///
/// # Errors
/// What could not be given up, in words: then nothing may be run.
pub fn confine(
    lower: Option<BorrowedFd<'_>>,
    upper: Option<BorrowedFd<'_>>,
) -> Result<Confinement, String> {
    nix::sys::prctl::set_no_new_privs().map_err(|why| format!("no-new-privileges: {why}"))?;
    let landlock = restrict_files(lower, upper).map_err(|why| format!("landlock: {why}"))?;
    let capabilities_dropped = drop_capabilities().is_ok();
    for (what, most) in [(libc::RLIMIT_CORE, 0), (libc::RLIMIT_NOFILE, 1024)] {
        let limit = libc::rlimit {
            rlim_cur: most,
            rlim_max: most,
        };
        // SAFETY: a structure that the call reads.
        let _fewer_already = unsafe { libc::setrlimit(what, &raw const limit) };
    }
    let filter = filter().map_err(|why| format!("seccomp: {why}"))?;
    seccompiler::apply_filter(&filter).map_err(|why| format!("seccomp: {why}"))?;
    Ok(Confinement {
        seccomp: true,
        landlock,
        capabilities_dropped,
        ring0_entry: false,
    })
}

fn restrict_files(
    lower: Option<BorrowedFd<'_>>,
    upper: Option<BorrowedFd<'_>>,
) -> Result<String, landlock::RulesetError> {
    let abi = ABI::V5;
    let mut rules = Ruleset::default()
        .set_compatibility(CompatLevel::BestEffort)
        .handle_access(AccessFs::from_all(abi))?
        .create()?;
    if let Some(lower) = lower {
        let read = AccessFs::ReadFile | AccessFs::ReadDir;
        rules = rules.add_rule(PathBeneath::new(lower, read))?;
    }
    if let Some(upper) = upper {
        let all = AccessFs::from_all(abi) & !AccessFs::Execute & !AccessFs::IoctlDev;
        rules = rules.add_rule(PathBeneath::new(upper, all))?;
    }
    let status = rules.restrict_self()?;
    Ok(match status.ruleset {
        RulesetStatus::FullyEnforced => "all",
        RulesetStatus::PartiallyEnforced => "some",
        RulesetStatus::NotEnforced => "none",
    }
    .to_owned())
}

/// Root without capabilities is a user who owns root's files.
fn drop_capabilities() -> nix::Result<()> {
    /// `struct __user_cap_header_struct`, version 3.
    #[repr(C)]
    struct Header {
        version: u32,
        pid: i32,
    }
    let header = Header {
        version: 0x2008_0522,
        pid: 0,
    };
    // Effective, permitted, inheritable, twice.
    let none = [0u32; 6];
    // SAFETY: both are what the call reads in this version.
    let done = unsafe { libc::syscall(libc::SYS_capset, &raw const header, none.as_ptr()) };
    Errno::result(done).map(drop)
}

/// Requests of `ioctl`: KVM's, by their letter, and the page map's.
const KVM_LETTER: u64 = 0xae00;
const LETTER: u64 = 0xff00;

fn filter() -> Result<BpfProgram, seccompiler::BackendError> {
    let always = [
        libc::SYS_read,
        libc::SYS_write,
        libc::SYS_pread64,
        libc::SYS_pwrite64,
        libc::SYS_lseek,
        libc::SYS_close,
        libc::SYS_close_range,
        libc::SYS_fstat,
        libc::SYS_newfstatat,
        libc::SYS_fstatfs,
        libc::SYS_openat2,
        libc::SYS_getdents64,
        libc::SYS_mkdirat,
        libc::SYS_unlinkat,
        libc::SYS_renameat,
        libc::SYS_renameat2,
        libc::SYS_symlinkat,
        libc::SYS_linkat,
        libc::SYS_readlinkat,
        libc::SYS_fchmod,
        libc::SYS_fchmodat,
        libc::SYS_ftruncate,
        libc::SYS_utimensat,
        libc::SYS_fcntl,
        libc::SYS_dup,
        libc::SYS_pipe2,
        libc::SYS_poll,
        libc::SYS_ppoll,
        libc::SYS_munmap,
        libc::SYS_madvise,
        libc::SYS_mremap,
        libc::SYS_brk,
        libc::SYS_sendmsg,
        libc::SYS_recvmsg,
        libc::SYS_wait4,
        libc::SYS_exit,
        libc::SYS_exit_group,
        libc::SYS_rt_sigaction,
        libc::SYS_rt_sigprocmask,
        libc::SYS_rt_sigreturn,
        libc::SYS_sigaltstack,
        libc::SYS_setitimer,
        libc::SYS_clock_gettime,
        libc::SYS_clock_nanosleep,
        libc::SYS_restart_syscall,
        libc::SYS_getrandom,
        libc::SYS_futex,
        libc::SYS_getpid,
        libc::SYS_gettid,
        libc::SYS_getppid,
        libc::SYS_memfd_create,
        libc::SYS_pidfd_open,
        libc::SYS_set_robust_list,
        libc::SYS_rseq,
        libc::SYS_sched_yield,
        libc::SYS_sched_getaffinity,
        libc::SYS_kill,
        libc::SYS_tgkill,
        libc::SYS_umask,
    ];
    let mut rules: BTreeMap<i64, Vec<SeccompRule>> =
        always.into_iter().map(|call| (call, Vec::new())).collect();
    let only = |argument: u8, op: SeccompCmpOp, value: u64| {
        SeccompCondition::new(argument, SeccompCmpArgLen::Dword, op, value)
            .and_then(|condition| SeccompRule::new(vec![condition]))
    };
    rules.insert(
        libc::SYS_ioctl,
        vec![
            only(1, SeccompCmpOp::MaskedEq(LETTER), KVM_LETTER)?,
            only(1, SeccompCmpOp::Eq, PAGEMAP_SCAN)?,
            only(1, SeccompCmpOp::Eq, libc::FIONREAD)?,
        ],
    );
    // Processes, no threads, no namespaces.
    let shares = (libc::CLONE_VM | libc::CLONE_THREAD | libc::CLONE_NEWUSER) as u64;
    rules.insert(
        libc::SYS_clone,
        vec![only(0, SeccompCmpOp::MaskedEq(shares), 0)?],
    );
    // No page of its own becomes executable.
    let execute = libc::PROT_EXEC as u64;
    for call in [libc::SYS_mmap, libc::SYS_mprotect] {
        rules.insert(call, vec![only(2, SeccompCmpOp::MaskedEq(execute), 0)?]);
    }
    rules.insert(
        libc::SYS_prctl,
        vec![
            only(0, SeccompCmpOp::Eq, libc::PR_SET_PDEATHSIG as u64)?,
            only(0, SeccompCmpOp::Eq, libc::PR_SET_NAME as u64)?,
            only(0, SeccompCmpOp::Eq, libc::PR_SET_CHILD_SUBREAPER as u64)?,
            // Names of anonymous memory, which the C library gives.
            only(0, SeccompCmpOp::Eq, 0x5356_4d41)?,
        ],
    );
    SeccompFilter::new(
        rules,
        SeccompAction::KillProcess,
        SeccompAction::Allow,
        TargetArch::x86_64,
    )?
    .try_into()
}
