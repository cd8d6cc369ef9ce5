//! The servers: `sapwood serve`, and `qemu-storage-daemon` with direct I/O and io_uring.

use std::fs;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result};
use sapwood_tests::guest::Backend;
use serde_json::{Value, json};

use super::case::Contestant;

/// Unit of the times in `/proc/PID/stat`, in seconds: USER_HZ, which is 100 on every architecture
/// that this runs on.
const TICKS_PER_SECOND: f64 = 100.0;

/// A server that listens.
pub struct Server {
    backend: Backend,
}

impl Server {
    /// Starts the contestant's program on a disk.
    ///
    /// # Errors
    /// It does not start or does not listen.
    pub fn start(
        contestant: Contestant,
        sapwood: &Path,
        disk: &Path,
        base: Option<&Path>,
        socket: &Path,
    ) -> Result<Self> {
        let (program, arguments) = match contestant {
            Contestant::SapwoodRaw => (sapwood.display().to_string(), serve("raw", disk, socket)),
            Contestant::SapwoodLayer => (sapwood.display().to_string(), serve("layer", disk, socket)),
            Contestant::QemuRaw => daemon(&raw(disk, false), true, socket),
            Contestant::Qcow2 | Contestant::Qcow2Extended => daemon(&qcow2(disk, base), true, socket),
        };
        Ok(Self { backend: Backend::start_program(&program, &arguments, socket)? })
    }

    /// Serves a volume of a store.
    ///
    /// # Errors
    /// It does not start or does not listen.
    pub fn of_volume(sapwood: &Path, store: &Path, volume: &str, socket: &Path) -> Result<Self> {
        let disk = format!("{}:{volume}", store.display());
        let arguments = ["serve", &disk, "--socket", &socket.display().to_string()].map(str::to_owned);
        Ok(Self { backend: Backend::start_program(&sapwood.display().to_string(), &arguments, socket)? })
    }

    /// Serves the top of a stack, for reading.
    ///
    /// # Errors
    /// It does not start or does not listen.
    pub fn of_stack(contestant: Contestant, sapwood: &Path, disk: &Path, socket: &Path) -> Result<Self> {
        let (program, arguments) = match contestant {
            Contestant::SapwoodLayer => {
                let mut arguments = serve("layer", disk, socket);
                arguments.push("--readonly".to_owned());
                (sapwood.display().to_string(), arguments)
            }
            _ => {
                // Without a word about the file below: the one that the image names.
                let mut node = qcow2(disk, None);
                node.as_object_mut().context("a node")?.remove("backing");
                node["read-only"] = true.into();
                node["file"]["read-only"] = true.into();
                let (program, arguments) = daemon(&node, false, socket);
                // It opens all images at once.
                let limited = ["--nofile=16384".to_owned(), program].into_iter().chain(arguments);
                ("prlimit".to_owned(), limited.collect())
            }
        };
        Ok(Self { backend: Backend::start_program(&program, &arguments, socket)? })
    }

    /// Memory that it has now, in bytes.
    ///
    /// # Errors
    /// It has ended.
    pub fn memory(&self) -> Result<u64> {
        let path = format!("/proc/{}/status", self.backend.id());
        let text = fs::read_to_string(&path).with_context(|| format!("reading {path}"))?;
        let line = text.lines().find_map(|line| line.strip_prefix("VmRSS:")).context("no VmRSS")?;
        let number = line.split_whitespace().next().context("no number")?;
        Ok(number.parse::<u64>()? * 1024)
    }

    /// Processor time that all threads of the server have used, the kernel's part included.
    ///
    /// # Errors
    /// It has ended.
    pub fn cpu(&self) -> Result<Duration> {
        let path = format!("/proc/{}/stat", self.backend.id());
        let text = fs::read_to_string(&path).with_context(|| format!("reading {path}"))?;
        // The name in parentheses may hold spaces. After it: the state, then ten numbers, then
        // utime and stime (proc_pid_stat(5)).
        let rest = text.rsplit_once(')').context("no name in parentheses")?.1;
        let ticks = rest.split_whitespace().skip(11).take(2).map(str::parse::<u64>);
        let ticks: u64 = ticks.sum::<Result<u64, _>>().with_context(|| format!("reading {path}"))?;
        Ok(Duration::from_secs_f64(ticks as f64 / TICKS_PER_SECOND))
    }

    /// `sapwood serve` of a layer with so much memory for its map.
    ///
    /// # Errors
    /// As for [`Server::start`].
    pub fn start_layer(sapwood: &Path, disk: &Path, socket: &Path, cache_bytes: u64) -> Result<Self> {
        let mut arguments = serve("layer", disk, socket);
        arguments.push(format!("--map-cache={cache_bytes}"));
        Ok(Self { backend: Backend::start_program(&sapwood.display().to_string(), &arguments, socket)? })
    }

    /// `qemu-storage-daemon` on a qcow2 file with so much memory for its L2 tables, read in the parts that
    /// suit random reads best.
    ///
    /// # Errors
    /// As for [`Server::start`].
    pub fn start_qcow2(disk: &Path, socket: &Path, cache_bytes: u64) -> Result<Self> {
        let mut node = qcow2(disk, None);
        node["l2-cache-size"] = cache_bytes.into();
        node["l2-cache-entry-size"] = 4096.into();
        let (program, arguments) = daemon(&node, false, socket);
        Ok(Self { backend: Backend::start_program(&program, &arguments, socket)? })
    }

    /// Bytes that it has read from disks so far; holes are not.
    ///
    /// # Errors
    /// It has ended.
    pub fn read_bytes(&self) -> Result<u64> {
        let path = format!("/proc/{}/io", self.backend.id());
        let text = fs::read_to_string(&path).with_context(|| format!("reading {path}"))?;
        let bytes = text.lines().find_map(|line| line.strip_prefix("read_bytes: "));
        bytes.context("no read_bytes")?.parse().with_context(|| format!("reading {path}"))
    }

    /// Ends it in its own good order.
    ///
    /// # Errors
    /// It failed.
    pub fn stop(self) -> Result<()> {
        self.backend.stop()
    }
}

fn serve(format: &str, disk: &Path, socket: &Path) -> Vec<String> {
    let socket = socket.display().to_string();
    ["serve", "-f", format, &disk.display().to_string(), "--socket", &socket].map(str::to_owned).into()
}

/// The file node that does the I/O.
fn file(path: &Path, read_only: bool) -> Value {
    json!({
        "driver": "file",
        "filename": path,
        "aio": "io_uring",
        "cache": { "direct": true },
        "discard": "unmap",
        "read-only": read_only,
    })
}

fn raw(path: &Path, read_only: bool) -> Value {
    json!({
        "driver": "raw",
        "file": file(path, read_only),
        "cache": { "direct": true },
        "discard": "unmap",
        "read-only": read_only,
    })
}

fn qcow2(path: &Path, base: Option<&Path>) -> Value {
    let mut node = json!({
        "driver": "qcow2",
        "file": file(path, false),
        "cache": { "direct": true },
        "discard": "unmap",
    });
    node["backing"] = base.map_or(Value::Null, |base| raw(base, true));
    node
}

fn daemon(node: &Value, writable: bool, socket: &Path) -> (String, Vec<String>) {
    let writable = if writable { "on" } else { "off" };
    let mut node = node.clone();
    node["node-name"] = "disk".into();
    let export = format!(
        "vhost-user-blk,id=export,node-name=disk,writable={writable},addr.type=unix,addr.path={}",
        socket.display()
    );
    let arguments = ["--blockdev".to_owned(), node.to_string(), "--export".to_owned(), export];
    ("qemu-storage-daemon".to_owned(), arguments.into())
}
