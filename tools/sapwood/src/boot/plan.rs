//! What is to be started, as the command line says it.

use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::time::Duration;

use sapwood_image::Format;

use crate::host::Host;
use crate::volumes::address::Address;

/// A virtual machine to start, and when to let it go.
pub struct Machine {
    /// What to start in it.
    pub boot: Boot,
    /// Virtual processors.
    pub cpus: u8,
    /// RAM in bytes.
    pub memory_bytes: u64,
    /// In the guest's order.
    pub disks: Vec<DiskSpec>,
    /// The first disk, if that is a volume of a store.
    pub first_volume: Option<Address>,
    /// How this process gets at files.
    pub host: Host,
    /// The serial port.
    pub console: ConsoleSpec,
    /// A guest that restarts ends instead.
    pub no_reboot: bool,
    /// For how long it may run, restarts included.
    pub timeout: Option<Duration>,
    /// Whether `/dev/kvm` is tried first.
    pub probe: bool,
}

/// Where the kernel comes from.
#[derive(Clone, Debug)]
pub enum Boot {
    /// Files of the host.
    Files {
        /// The kernel.
        kernel: PathBuf,
        /// The initial file system.
        initrd: Option<PathBuf>,
        /// The whole command line.
        cmdline: String,
    },
    /// What lies on the first disk.
    FirstDisk {
        /// The boot entry, by its name or title; the default one otherwise.
        entry: Option<String>,
        /// Added to the command line that is found.
        append: Option<String>,
    },
}

/// A disk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DiskSpec {
    /// Who serves it.
    pub place: DiskPlace,
    /// Virtqueues; as many as processors otherwise.
    pub queues: Option<u16>,
}

/// Who serves a disk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum DiskPlace {
    /// A server that is started for it.
    File {
        /// The disk.
        path: PathBuf,
        /// Its format; found by its first bytes otherwise.
        format: Option<Format>,
        /// The guest may only read it.
        read_only: bool,
        /// Where its server takes orders.
        control: Option<PathBuf>,
    },
    /// One that runs already.
    Socket(PathBuf),
}

/// Where the serial port leads.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ConsoleSpec {
    /// Standard input and output.
    Stdio,
    /// Nowhere.
    None,
    /// To a file, which is made or emptied; nothing is typed.
    File(PathBuf),
}

impl DiskSpec {
    /// Virtqueues of the disk of a guest with `cpus` processors.
    pub fn queues(&self, cpus: u8) -> u16 {
        self.queues.unwrap_or(u16::from(cpus))
    }

    /// What messages call it.
    pub fn name(&self) -> &Path {
        match &self.place {
            DiskPlace::File { path, .. } | DiskPlace::Socket(path) => path,
        }
    }
}

/// The parts of a text between single commas; a doubled comma is one that belongs to a part.
fn parts(text: &str) -> Vec<String> {
    let mut parts = vec![String::new()];
    let mut letters = text.chars().peekable();
    while let Some(letter) = letters.next() {
        match parts.last_mut() {
            Some(part) if letter != ',' || letters.next_if_eq(&',').is_some() => part.push(letter),
            _ => parts.push(String::new()),
        }
    }
    parts
}

impl FromStr for DiskSpec {
    type Err = String;

    /// Reads `FILE[,format=FORMAT][,readonly][,queues=N][,control=PATH]` or `socket=PATH[,queues=N]`.
    fn from_str(text: &str) -> Result<Self, String> {
        let parts = parts(text);
        let (first, options) = parts.split_first().ok_or("a disk has a name")?;
        let socket = first.strip_prefix("socket=");
        let name = socket.unwrap_or(first);
        if name.is_empty() {
            return Err("which disk? Write FILE or socket=PATH first".to_owned());
        }
        let (mut format, mut read_only, mut queues, mut control) = (None, false, None, None);
        for option in options {
            match option.split_once('=').unwrap_or((option, "")) {
                ("format", name) if socket.is_none() => {
                    format = Some(name.parse::<Format>().map_err(|error| error.to_string())?);
                }
                ("readonly" | "read-only", "") if socket.is_none() => read_only = true,
                ("queues", number) => {
                    let number = number.parse().ok().filter(|n| (1..=256).contains(n));
                    queues = Some(number.ok_or("queues is a number from 1 to 256")?);
                }
                ("control", path) if socket.is_none() && !path.is_empty() => control = Some(path.into()),
                ("format" | "readonly" | "read-only" | "control", _) if socket.is_some() => {
                    return Err(format!("{option}: the server at the socket decides that"));
                }
                _ => {
                    return Err(format!(
                        "unknown option '{option}': there are format=raw|layer|qcow2, readonly, queues=N and \
                         control=PATH (a comma in a name is written twice)"
                    ));
                }
            }
        }
        if format == Some(Format::Qcow2) && !read_only {
            return Err(
                "qcow2 images are read, not written: add ,readonly, or make a layer over it".to_owned()
            );
        }
        let place = match socket {
            Some(path) => DiskPlace::Socket(path.into()),
            None => DiskPlace::File { path: first.into(), format, read_only, control },
        };
        Ok(Self { place, queues })
    }
}

impl FromStr for ConsoleSpec {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match (text, text.strip_prefix("file=")) {
            ("stdio", _) => Ok(Self::Stdio),
            ("none", _) => Ok(Self::None),
            (_, Some(path)) if !path.is_empty() => Ok(Self::File(path.into())),
            _ => Err("a console is stdio, none or file=PATH".to_owned()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(path: &str, format: Option<Format>, read_only: bool) -> DiskPlace {
        DiskPlace::File { path: path.into(), format, read_only, control: None }
    }

    #[test]
    fn disks_are_read() {
        let disk = |text: &str| text.parse::<DiskSpec>().unwrap();
        assert_eq!(disk("a.layer"), DiskSpec { place: file("a.layer", None, false), queues: None });
        assert_eq!(
            disk("a,,b,format=raw,readonly,queues=3"),
            DiskSpec { place: file("a,b", Some(Format::Raw), true), queues: Some(3) }
        );
        assert_eq!(disk("a=b").place, file("a=b", None, false));
        assert_eq!(
            disk("socket=/run/s,queues=256"),
            DiskSpec { place: DiskPlace::Socket("/run/s".into()), queues: Some(256) }
        );
        assert_eq!(disk("a,format=qcow2,read-only").place, file("a", Some(Format::Qcow2), true));
        let DiskPlace::File { control, .. } = disk("a,control=b,,c").place else { panic!("a file") };
        assert_eq!(control, Some("b,c".into()));
        assert_eq!((disk("a").queues(2), disk("a,queues=5").queues(2)), (2, 5));
        for (bad, why) in [
            ("", "which disk"),
            ("socket=", "which disk"),
            ("a,format=vmdk", "vmdk"),
            ("a,queues=0", "1 to 256"),
            ("a,queues=257", "1 to 256"),
            ("a,b", "'b'"),
            ("a,", "''"),
            ("a,readonly=no", "readonly=no"),
            ("socket=s,readonly", "the server"),
            ("socket=s,control=c", "the server"),
            ("a,control=", "control="),
            ("a,format=qcow2", "readonly"),
        ] {
            let error = bad.parse::<DiskSpec>().unwrap_err();
            assert!(error.contains(why), "{bad}: {error}");
        }
    }

    #[test]
    fn consoles_are_read() {
        let console = |text: &str| text.parse::<ConsoleSpec>();
        assert_eq!(console("stdio"), Ok(ConsoleSpec::Stdio));
        assert_eq!(console("none"), Ok(ConsoleSpec::None));
        assert_eq!(console("file=a b"), Ok(ConsoleSpec::File("a b".into())));
        for bad in ["", "file", "file=", "pty"] {
            assert!(console(bad).is_err(), "{bad}");
        }
    }
}
