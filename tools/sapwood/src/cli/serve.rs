//! `sapwood serve`.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use anyhow::{Context, bail};
use clap::Args;
use rustix::fs::Mode;
use rustix::process::Signal;
use sapwood_blockdev::device::{BlockDevice, Geometry};
use sapwood_blockdev::io::{Io, block_on};
use sapwood_blockdev::storage::HostStorage;
use sapwood_image::layer::{self, Tuning};
use sapwood_image::{Disk, ErrorKind, Format, ImageError, OpenDisk};
use sapwood_qos::account::Accounted;
use sapwood_vhost::{Options, Server};
use sapwood_vmm::run::allow_descriptors;
use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::flag;
use signal_hook::iterator::Signals;

use super::limits::LimitOptions;
use super::reading::Reading;
use super::store::DefaultStore;
use super::{output, size};
use crate::boot::{CHILD_OF, end_with, remove_folder_of, with_options};
use crate::control::limits::DiskLimits;
use crate::control::listen::Listener;
use crate::control::{Control, Served};
use crate::host::{Host, HostEngine, serving};
use crate::metrics::listen::Loopback;
use crate::metrics::page::Page;
use crate::metrics::{self, Statistics};
use crate::volumes::access::Access;
use crate::volumes::address::Address;
use crate::volumes::attached::{self, Attached};
use crate::volumes::service::Service;
use crate::volumes::{CONNECTION_TIME_MAX, look, routes};

/// Of its open files a server's disk has one part in so many for layers below; the others are for queues and packs.
const SHARE: u64 = 16;
/// Exit code when a second signal comes before everything is durable.
pub const EXIT_INTERRUPTED: i32 = 130;

/// Serve a disk to a virtual machine over vhost-user-blk
///
/// Prints one line when it is ready, and serves one virtual machine after the other. SIGTERM or
/// SIGINT ends it: requests are drained, everything is made durable, and the exit code is 0. A
/// second signal ends it at once (exit code 130); then, as after a crash, the disk recovers when it
/// is next opened: what was flushed is there.
#[derive(Args, Debug)]
#[command(after_help = "Examples:
  sapwood serve vm1.layer --socket /run/vm1.sock --queues 4 --control /run/vm1.control
  qemu-system-x86_64 -object memory-backend-memfd,id=mem,size=2G,share=on -machine q35,memory-backend=mem \\
    -chardev socket,id=disk,path=/run/vm1.sock -device vhost-user-blk-pci,chardev=disk,num-queues=4 ...

Notes go to standard error; SAPWOOD_LOG=debug shows more of them, SAPWOOD_LOG=warn fewer.")]
pub struct Serve {
    /// Format of the disk; needed unless it is a layer or qcow2
    #[arg(short, long, value_name = "FORMAT")]
    format: Option<Format>,

    /// Where the virtual machine connects; only this user may
    #[arg(long, value_name = "PATH")]
    socket: PathBuf,

    /// Where this server takes orders while it serves (see sapwood resize --control); only this user
    /// may connect
    #[arg(long, value_name = "PATH")]
    control: Option<PathBuf>,

    /// Where this host's Prometheus gets its page, for example 127.0.0.1:9123; the control socket has the same page
    #[arg(long, value_name = "ADDRESS")]
    metrics: Option<Loopback>,

    /// Refuse writes; other readers may use the disk too. Needed for qcow2
    #[arg(long, alias = "read-only")]
    readonly: bool,

    /// Queues, each with a thread of its own
    #[arg(long, value_name = "N", default_value_t = 1)]
    #[arg(value_parser = clap::value_parser!(u16).range(1..=256))]
    queues: u16,

    /// Memory for a layer's map, for example 256M. As much again may be taken by what has changed in it
    #[arg(long, value_name = "SIZE", default_value = "64M")]
    map_cache: size::Size,

    /// Space that a layer's file may take, as a share of the data that is live in it; more means less work for the
    /// cleaner, which moves data so that overwritten data can be let go
    #[arg(long, value_name = "PERCENT", default_value_t = 130)]
    #[arg(value_parser = clap::value_parser!(u64).range(105..=1000))]
    space_percent: u64,

    /// Space that it may take besides; by default a tenth of the disk, from 64M to 2G
    #[arg(long, value_name = "SIZE")]
    space_slack: Option<size::Size>,

    #[command(flatten)]
    limits: LimitOptions,

    #[command(flatten)]
    reading: Reading,

    #[command(flatten)]
    store: DefaultStore,

    /// Stop when this process, the one that started this one, has ended
    #[arg(long = CHILD_OF, value_name = "PID", hide = true)]
    child_of: Option<u32>,

    /// The disk, or a volume of a store that no daemon has, as STORE:volume
    #[arg(value_name = "DISK")]
    path: PathBuf,
}

impl Serve {
    pub fn run(self, host: &Host) -> anyhow::Result<()> {
        if let Some(parent) = self.child_of {
            end_with(parent, Signal::TERM)?;
        }
        crate::abort_on_panic();
        allow_descriptors();
        // Before there are threads: the socket, and all else we make, is this user's alone.
        rustix::process::umask(Mode::RWXG | Mode::RWXO);
        let mut signals = signals(self.child_of.is_none()).context("cannot take signals")?;
        if let Some(address) = Address::of_disk(self.path.as_os_str(), self.store.given())? {
            return self.serve_volume(host, address, &mut signals);
        }
        // Before the disk is opened: what makes no sense changes nothing.
        self.limits.settings()?;
        let options = OpenDisk { tuning: self.tuning(), ..self.reading.open(self.format, self.readonly) };
        let (io, storage, path) = (host.io()?, host.storage(), self.path.clone());
        let opening = {
            let io = io.clone();
            async move { open(&storage, &io, &path, options).await }
        };
        let opened = block_on(&io, opening);
        let disk = if self.child_of.is_some() { opened.map_err(with_options)? } else { opened? };
        log_map(&disk);
        let maintenance = if self.readonly {
            None
        } else {
            let disk = Arc::clone(&disk);
            Some(host.maintain(|io| async move { disk.maintain(io).await })?)
        };
        let served = self.serve(*host, &disk, &mut signals);
        let closing = {
            let (disk, io) = (Arc::clone(&disk), io.clone());
            async move { disk.close(&io).await }
        };
        let closed = block_on(&io, closing).context("what was not flushed may be lost");
        if maintenance.is_some_and(|thread| thread.join().is_err()) {
            log::error!("the maintenance thread panicked");
        }
        log_map(&disk);
        if self.child_of.is_some() {
            remove_folder_of(&self.socket);
        }
        served?;
        closed?;
        log::info!("stopped: everything is durable");
        Ok(())
    }

    /// Serves a volume of a store, which this process opens for that.
    fn serve_volume(&self, host: &Host, address: Address, signals: &mut Signals) -> anyhow::Result<()> {
        if self.format.is_some() || self.readonly || self.reading.is_given() {
            bail!("{}: a volume is served without --format and --readonly", self.path.display());
        }
        if !self.limits.named()?.is_empty() {
            bail!("{}: the limits of a volume are those that sapwood limit sets", self.path.display());
        }
        let Access::Direct(service) = Access::to(*host, &address.store)? else {
            bail!("{}: the daemon of the store has it: use sapwood attach", self.path.display());
        };
        let volume = address.volume()?;
        let serve = attached::Serve {
            socket: self.socket.clone(),
            queues: self.queues,
            serial: volume.clone(),
            tuning: self.tuning(),
            transient: true,
        };
        let attached = Attached::volume(&service, &volume, serve)?;
        service.add(&attached);
        let served = self.serve_numbers(&service).and_then(|_listeners| {
            output::print(&self.ready_line("volume", attached.size(), false))?;
            signals.forever().next();
            log::info!("stopping: a second signal ends this at once");
            Ok(())
        });
        let closed = service.close();
        if self.child_of.is_some() {
            remove_folder_of(&self.socket);
        }
        served?;
        closed?;
        log::info!("stopped: everything is durable");
        Ok(())
    }

    /// Answers who asks what the guest of a volume does, until what is returned is dropped.
    fn serve_numbers(&self, service: &Arc<Service>) -> anyhow::Result<[Option<Listener>; 2]> {
        let control = self
            .control
            .as_ref()
            .map(|path| Listener::start(path, routes::numbers(Arc::clone(service)), CONNECTION_TIME_MAX));
        let page = Arc::clone(service);
        let metrics =
            self.metrics.map(|address| metrics::listen::start(address, Arc::new(move || look::page(&page))));
        Ok([control.transpose()?, metrics.transpose()?])
    }

    /// Serves until a signal comes and all requests are drained.
    fn serve(&self, host: Host, disk: &Arc<Disk<HostEngine>>, signals: &mut Signals) -> anyhow::Result<()> {
        let (limited, limits) = DiskLimits::new(Arc::clone(disk), self.limits.named()?)?;
        let accounted = Accounted::new(limited);
        let server = Arc::new(Server::start(Arc::clone(&accounted), self.options(), move || host.engine())?);
        let served = Served {
            host,
            disk: Arc::clone(disk),
            accounted,
            path: self.path.clone(),
            server: Arc::clone(&server),
            limits: Arc::new(limits),
        };
        let metrics = self.metrics.map(|address| {
            let served = served.clone();
            let page = move || Ok(Page::alone(Statistics::of_served(&served)));
            metrics::listen::start(address, Arc::new(page))
        });
        let metrics = metrics.transpose()?;
        let control = self.control.as_ref().map(|path| Control::start(path, served)).transpose()?;
        let Geometry { size, read_only, .. } = disk.geometry();
        output::print(&self.ready_line(disk.format().name(), size, read_only))?;
        signals.forever().next();
        log::info!("stopping: a second signal ends this at once");
        drop((control, metrics));
        server.stop();
        Ok(())
    }

    fn tuning(&self) -> Tuning {
        Tuning {
            map_cache_bytes: self.map_cache.0,
            space_percent: self.space_percent,
            space_slack: self.space_slack.as_ref().map(|slack| slack.0),
            ..serving(SHARE)
        }
    }

    fn options(&self) -> Options {
        let serial = self.path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        Options { queues: self.queues, serial, ..Options::new(&self.socket) }
    }

    fn ready_line(&self, format: &str, size: u64, read_only: bool) -> String {
        format!(
            "Serving {} ({}, {}{}) at {} with {} queue{}\n",
            self.path.display(),
            format,
            size::short(size),
            if read_only { ", read-only" } else { "" },
            self.socket.display(),
            self.queues,
            if self.queues == 1 { "" } else { "s" },
        )
    }
}

/// The signals that end a server. From the second one on they end the process, unless it follows another one: then a signal
/// may come from that one and again from who ends both, and whoever has no time kills it.
pub fn signals(is_alone: bool) -> std::io::Result<Signals> {
    let asked = Arc::new(AtomicBool::new(false));
    for signal in [SIGTERM, SIGINT] {
        if is_alone {
            flag::register_conditional_shutdown(signal, EXIT_INTERRUPTED, Arc::clone(&asked))?;
            flag::register(signal, Arc::clone(&asked))?;
        }
    }
    Signals::new([SIGTERM, SIGINT])
}

/// Says how much of a layer's map is in memory, and what that has cost so far.
fn log_map(disk: &Disk<HostEngine>) {
    if let Disk::Layer(layer) = disk {
        let info = layer.info();
        log::info!(
            "map: {} stored, {} of {} in memory, {} reads",
            size::short(info.map_stored_bytes),
            size::short(info.map_bytes),
            size::short(info.map_cache_bytes),
            info.map_reads,
        );
    }
}

/// Opens the disk. A commit that a killed server left is finished first: nothing else can be done with
/// such a layer.
async fn open(
    storage: &HostStorage,
    io: &Io<HostEngine>,
    path: &Path,
    options: OpenDisk,
) -> Result<Arc<Disk<HostEngine>>, ImageError> {
    let read_only = options.read_only;
    match Disk::open(storage, io, path, options.clone()).await {
        Err(ImageError { kind: ErrorKind::Unfinished(_), .. }) if !read_only => {}
        opened => return opened,
    }
    log::warn!("{}: it was being merged into its base: that is finished first", path.display());
    let committed = layer::commit(storage, io, path, false, Tuning::default(), &mut |_, _| {}).await?;
    log::info!("{}: it is merged into {}", path.display(), committed.base.display());
    Disk::open(storage, io, path, options).await
}
