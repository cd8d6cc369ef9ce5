//! What the running kernel's io_uring offers.

use std::fmt;
use std::io;

use io_uring::{IoUring, Probe, opcode};

use super::uring::UringOptions;
use crate::Errno;

/// Parts of io_uring that an engine does without where they are missing. Each is found out by
/// trying it on the running kernel, so back-ports and seccomp filters are honoured; versions
/// name the first mainline kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Features {
    /// A failed entry does not stop the submission of those behind it (Linux 5.18).
    pub submit_all: bool,
    /// Completions do not interrupt a running thread (5.19).
    pub coop_taskrun: bool,
    /// The kernel may rely on one thread submitting (6.0).
    pub single_issuer: bool,
    /// Completions are processed when the thread asks for them (6.1); needs `single_issuer`.
    pub defer_taskrun: bool,
    /// A table of registered files, which saves looking descriptors up (5.19 in its sparse form).
    pub fixed_files: bool,
    /// Renaming and unlinking (5.11); else performed as blocking calls.
    pub names: bool,
    /// Setting a file's size (6.9); else performed as a blocking call.
    pub truncate: bool,
}

impl Features {
    /// Everything.
    pub const ALL: Self = Self {
        submit_all: true,
        coop_taskrun: true,
        single_issuer: true,
        defer_taskrun: true,
        fixed_files: true,
        names: true,
        truncate: true,
    };

    /// Nothing that is optional: what a Linux 5.11 would give.
    pub const NONE: Self = Self {
        submit_all: false,
        coop_taskrun: false,
        single_issuer: false,
        defer_taskrun: false,
        fixed_files: false,
        names: false,
        truncate: false,
    };

    fn named(&self) -> [(&'static str, bool); 7] {
        [
            ("SUBMIT_ALL", self.submit_all),
            ("COOP_TASKRUN", self.coop_taskrun),
            ("SINGLE_ISSUER", self.single_issuer),
            ("DEFER_TASKRUN", self.defer_taskrun),
            ("registered files", self.fixed_files),
            ("RENAMEAT/UNLINKAT", self.names),
            ("FTRUNCATE", self.truncate),
        ]
    }

    /// The newest set-up flag in use taken away; `None` when none is left.
    fn without_newest_flag(mut self) -> Option<Self> {
        let newest =
            [&mut self.defer_taskrun, &mut self.single_issuer, &mut self.coop_taskrun, &mut self.submit_all];
        *newest.into_iter().find(|flag| **flag)? = false;
        Some(self)
    }
}

/// What is in use and what is not, for a log.
impl fmt::Display for Features {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let list = |wanted: bool| {
            let names = self.named().into_iter().filter(|(_, used)| *used == wanted);
            names.map(|(name, _)| name).collect::<Vec<_>>().join(", ")
        };
        match (list(true), list(false)) {
            (used, unused) if unused.is_empty() => write!(f, "{used}"),
            (used, unused) if used.is_empty() => write!(f, "nothing optional (without {unused})"),
            (used, unused) => write!(f, "{used} (without {unused})"),
        }
    }
}

/// Makes a ring with what is both allowed by `options` and offered by the kernel.
///
/// # Errors
/// `Unsupported` where io_uring is older than Linux 5.11; else what io_uring_setup(2) says:
/// ENOSYS, EPERM (seccomp, the `io_uring_disabled` sysctl), ENOMEM (RLIMIT_MEMLOCK).
pub(super) fn build(options: &UringOptions) -> io::Result<(IoUring, Features)> {
    let (ring, mut features) = set_up(options)?;
    let parameters = ring.params();
    let needed = [
        ("EXT_ARG", parameters.is_feature_ext_arg()),
        ("NODROP", parameters.is_feature_nodrop()),
        ("SUBMIT_STABLE", parameters.is_feature_submit_stable()),
    ];
    if let Some((name, _)) = needed.iter().find(|(_, present)| !present) {
        let text = format!("the kernel's io_uring lacks {name} (Linux 5.11 has it)");
        return Err(io::Error::new(io::ErrorKind::Unsupported, text));
    }
    let mut probe = Probe::new();
    ring.submitter().register_probe(&mut probe)?;
    let has = |code| probe.is_supported(code);
    features.names &= has(opcode::RenameAt::CODE) && has(opcode::UnlinkAt::CODE);
    features.truncate &= has(opcode::Ftruncate::CODE);
    if features.fixed_files
        && let Err(error) = ring.submitter().register_files_sparse(options.files)
    {
        log::debug!("io_uring: no registered files: {error}");
        features.fixed_files = false;
    }
    Ok((ring, features))
}

/// Tries flag sets from the full one down: EINVAL says that the kernel does not know a flag.
fn set_up(options: &UringOptions) -> io::Result<(IoUring, Features)> {
    let mut features = options.allowed;
    features.defer_taskrun &= features.single_issuer;
    loop {
        let mut builder = IoUring::builder();
        builder.dontfork().setup_clamp().setup_cqsize(options.in_flight.max(options.entries));
        if features.submit_all {
            builder.setup_submit_all();
        }
        if features.single_issuer {
            builder.setup_single_issuer();
        }
        if features.coop_taskrun {
            builder.setup_coop_taskrun();
        }
        if features.defer_taskrun {
            builder.setup_defer_taskrun();
        }
        // Either wants the flag in the ring that says when an enter is needed to see completions.
        if features.coop_taskrun || features.defer_taskrun {
            builder.setup_taskrun_flag();
        }
        match builder.build(options.entries) {
            Ok(ring) => return Ok((ring, features)),
            Err(error) if Errno::from_io_error(&error) == Some(Errno::INVAL) => {
                features = features.without_newest_flag().ok_or(error)?;
            }
            Err(error) => return Err(error),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn flags_go_newest_first() {
        let mut features = Features::ALL;
        let mut steps = 0;
        while let Some(fewer) = features.without_newest_flag() {
            features = fewer;
            steps += 1;
            assert!(!features.defer_taskrun);
        }
        assert_eq!(steps, 4);
        assert_eq!(features, Features { fixed_files: true, names: true, truncate: true, ..Features::NONE });
    }

    #[test]
    fn shows_what_is_missing() {
        let features = Features { truncate: false, ..Features::ALL };
        assert!(features.to_string().ends_with("RENAMEAT/UNLINKAT (without FTRUNCATE)"), "{features}");
        assert!(Features::NONE.to_string().starts_with("nothing optional (without SUBMIT_ALL"));
    }
}
