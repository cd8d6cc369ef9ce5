//! A volume or snapshot that is served to virtual machines.
//!
//! Order of attaching: the store gives the volume, its layer is opened, the thread for its background work starts,
//! then the server at the socket. Detaching is the reverse, and what guests wrote is durable when it is done.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use sapwood_blockdev::buffer::SharedBuf;
use sapwood_blockdev::device::{self, BlockDevice, Command, Geometry};
use sapwood_blockdev::io::run_alone;
use sapwood_blockdev::storage::HostStorage;
use sapwood_blockdev::units::GuestOffset;
use sapwood_image::layer::Tuning;
use sapwood_image::volume::Volume;
use sapwood_image::{Counts, Disk};
use sapwood_qos::account::{Account, Accounted};
use sapwood_qos::arbiter::NodeId;
use sapwood_qos::limited::Limited;
use sapwood_store::rows::GroupRow;
use sapwood_store::{Attachment, Id, SnapshotName, SnapshotReader};
use sapwood_vhost::{Options, Server};

use super::answer::Serving;
use super::service::{Service, system};
use crate::control::wire::Failure;
use crate::host::{HostEngine, serving};
use crate::metrics::{DiskStatistics, Totals};

/// Disks that a daemon can serve before their files of layers below reach its limit of open files.
const DISKS: u64 = 512;
/// Longest path of a unix socket in bytes.
const SOCKET_PATH_MAX: usize = 107;
/// The unit in which a disk is read, in bytes.
const SECTOR: u64 = 512;
/// Bytes that are read at a time.
const PIECE_BYTES: usize = 128 << 10;

/// How to serve something.
#[derive(Clone, Debug)]
pub struct Serve {
    /// Where a virtual machine connects.
    pub socket: PathBuf,
    /// Virtqueues, each with a thread.
    pub queues: u16,
    /// What guests see as the disk's serial number.
    pub serial: String,
    /// Bounds of a volume's memory, space and background work.
    pub tuning: Tuning,
    /// Whether the next daemon is not to attach it again.
    pub transient: bool,
}

/// The bounds of a volume that a daemon serves.
pub fn tuning() -> Tuning {
    serving(DISKS)
}

/// An open volume with its background work.
struct Running {
    attachment: Attachment,
    volume: Arc<Volume<HostEngine>>,
    maintenance: JoinHandle<()>,
}

/// What a virtual machine sees.
enum Device {
    Volume(Arc<Accounted<Limited<Volume<HostEngine>>>>),
    Snapshot(Arc<Accounted<Limited<Disk<HostEngine>>>>),
}

/// What ends with the detaching.
enum Held {
    Volume(Running),
    Snapshot(Arc<Disk<HostEngine>>, SnapshotReader),
}

/// See the module's documentation.
pub struct Attached {
    id: Id,
    /// The disk, as whoever limits it knows it.
    node: NodeId,
    serve: Serve,
    device: Device,
    server: Server,
    /// Whoever snapshots, resizes or detaches it has the lock; none when it is detached.
    held: Mutex<Option<Held>>,
}

impl Device {
    fn geometry(&self) -> Geometry {
        match self {
            Self::Volume(volume) => volume.geometry(),
            Self::Snapshot(disk) => disk.geometry(),
        }
    }

    fn requests(&self) -> u64 {
        match self {
            Self::Volume(volume) => volume.requests(),
            Self::Snapshot(disk) => disk.requests(),
        }
    }

    fn account(&self) -> Account {
        match self {
            Self::Volume(volume) => volume.account(),
            Self::Snapshot(disk) => disk.account(),
        }
    }

    /// What it was for the layer and the caches.
    fn counts(&self) -> Option<Counts> {
        match self {
            Self::Volume(volume) => Some(volume.inner().inner().layer().counts()),
            Self::Snapshot(disk) => disk.inner().inner().counts(),
        }
    }

    /// For how long requests had waited for limits that let them through.
    fn waited(&self) -> Duration {
        match self {
            Self::Volume(volume) => volume.inner().waited(),
            Self::Snapshot(disk) => disk.inner().waited(),
        }
    }
}

impl Running {
    fn open(service: &Service, name: &str, tuning: Tuning) -> Result<Self, Failure> {
        let name = name.to_owned();
        let (attachment, volume) = service.run(|store, io| async move {
            let attachment = store.attach(&io, &name).await?;
            let volume = store.open_volume(&io, &attachment, tuning).await?;
            Ok::<_, Failure>((attachment, volume))
        })?;
        let maintained = Arc::clone(&volume);
        match service.host().maintain(|io| maintained.maintain(io)) {
            Ok(maintenance) => Ok(Self { attachment, volume, maintenance }),
            Err(error) => {
                let closed = close(service, &volume);
                Err(closed.err().unwrap_or_else(|| system(error)))
            }
        }
    }

    /// Reads bytes as a guest does.
    fn read(&self, service: &Service, start: u64, length: u64) -> Result<Vec<u8>, Failure> {
        let size = self.volume.geometry().size;
        let is_whole = start.is_multiple_of(SECTOR) && length.is_multiple_of(SECTOR);
        if !is_whole || start.checked_add(length).is_none_or(|end| end > size) {
            let text = format!("{length} bytes at {start}: no whole sectors of a disk of {size} bytes");
            return Err(Failure::new("invalid", text));
        }
        let mut queue = self.volume.queue(service.host().engine().map_err(system)?);
        let (memory, mut bytes) = (SharedBuf::heap(PIECE_BYTES), vec![0; length as usize]);
        for (piece, at) in bytes.chunks_mut(PIECE_BYTES).zip((start..).step_by(PIECE_BYTES)) {
            let command = Command::Read(memory.slice(0..piece.len()).into());
            device::run(&mut queue, GuestOffset(at), piece.len() as u64, command).map_err(system)?;
            memory.read_at(0, piece);
        }
        Ok(bytes)
    }

    /// Makes everything durable, and gives the volume back. Nobody uses a queue any more.
    fn close(self, service: &Service) -> Result<(), Failure> {
        let closed = close(service, &self.volume);
        if self.maintenance.join().is_err() {
            log::error!("the maintenance thread of {} panicked", self.attachment.name);
        }
        let Geometry { size, .. } = self.volume.geometry();
        // A layer that was not closed knows its size, too.
        service.store().detach(self.attachment, closed.is_ok().then_some(size))?;
        closed
    }
}

/// Starts a server of `device`.
fn start<D>(service: &Service, device: &Arc<D>, serve: &Serve) -> Result<Server, Failure>
where
    D: BlockDevice<Engine = HostEngine>,
{
    let options =
        Options { queues: serve.queues, serial: serve.serial.clone(), ..Options::new(&serve.socket) };
    let host = service.host();
    Ok(Server::start(Arc::clone(device), options, move || host.engine())?)
}

impl Attached {
    /// Attaches a volume.
    pub fn volume(service: &Service, name: &str, serve: Serve) -> Result<Arc<Self>, Failure> {
        check_socket(&serve.socket)?;
        let running = Running::open(service, name, serve.tuning)?;
        let (id, volume) = (running.attachment.volume, Arc::clone(&running.volume));
        let started = service.throttle().limit(service.store(), id, volume).and_then(|limited| {
            let (node, accounted) = (limited.node(), Accounted::new(limited));
            let server = start(service, &accounted, &serve)?;
            Ok((node, accounted, server))
        });
        match started {
            Ok((node, accounted, server)) => {
                service.throttle().ledger().add(node);
                Ok(Arc::new(Self {
                    id,
                    node,
                    serve,
                    device: Device::Volume(accounted),
                    server,
                    held: Mutex::new(Some(Held::Volume(running))),
                }))
            }
            Err(error) => {
                running.close(service)?;
                Err(error)
            }
        }
    }

    /// Attaches a snapshot, for reading.
    pub fn snapshot(service: &Service, name: &SnapshotName, serve: Serve) -> Result<Arc<Self>, Failure> {
        check_socket(&serve.socket)?;
        let reader = service.store().read_snapshot(name)?;
        let (disk, reader) = service.run(|store, io| async move {
            let disk = store.open_snapshot(&io, &reader).await?;
            Ok::<_, Failure>((disk, reader))
        })?;
        let limited = service.throttle().limit(service.store(), reader.id, Arc::clone(&disk))?;
        let (node, accounted) = (limited.node(), Accounted::new(limited));
        let server = start(service, &accounted, &serve)?;
        service.throttle().ledger().add(node);
        Ok(Arc::new(Self {
            id: reader.id,
            node,
            serve,
            device: Device::Snapshot(accounted),
            server,
            held: Mutex::new(Some(Held::Snapshot(disk, reader))),
        }))
    }

    /// The id of what is attached.
    pub fn id(&self) -> Id {
        self.id
    }

    /// The disk, as whoever limits it knows it.
    pub fn node(&self) -> NodeId {
        self.node
    }

    /// How it was asked to be served.
    pub fn serve(&self) -> &Serve {
        &self.serve
    }

    /// How it is served now.
    pub fn serving(&self) -> Serving {
        Serving {
            socket: self.serve.socket.clone(),
            queues: self.serve.queues,
            read_only: self.device.geometry().read_only,
            frontend_connected: self.server.is_connected(),
            requests: self.requests(),
        }
    }

    /// Requests that were taken since it was attached.
    pub fn requests(&self) -> u64 {
        self.device.requests()
    }

    /// What guests did with it since then.
    pub fn totals(&self) -> Totals {
        Totals::new(self.device.account(), self.device.waited(), self.device.counts())
    }

    /// The same with more about it; `name` is what it is called now, and `row` says what it may do.
    pub fn statistics(&self, name: String, row: GroupRow, totals: Totals) -> DiskStatistics {
        let layer = match &self.device {
            Device::Volume(volume) => Some(volume.inner().inner().layer().info().into()),
            Device::Snapshot(_) => None,
        };
        DiskStatistics {
            name,
            virtual_size: self.size(),
            frontend_connected: self.server.is_connected(),
            group: row.group,
            limits: row.limits,
            totals,
            layer,
        }
    }

    /// Size of the disk in bytes.
    pub fn size(&self) -> u64 {
        self.device.geometry().size
    }

    fn held(&self) -> MutexGuard<'_, Option<Held>> {
        self.held.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Changes the size of a volume's disk to what `plan` makes of its old one, and tells the guest; the sizes before and
    /// after, in bytes. The catalog has the new one when this returns.
    pub fn resize(
        &self,
        service: &Service,
        plan: impl FnOnce(u64) -> Result<u64, Failure>,
    ) -> Result<(u64, u64), Failure> {
        let held = self.held();
        let Some(Held::Volume(running)) = &*held else { return Err(gone()) };
        let (volume, old) = (Arc::clone(&running.volume), self.size());
        let size = plan(old)?;
        service.run(|_, io| async move { volume.resize(&io, size).await })?;
        self.server.config_changed();
        let size = self.size();
        service.store().resized(self.id, size)?;
        Ok((old, size))
    }

    /// Takes a snapshot of a volume while its guest writes; its id.
    pub fn take_snapshot(&self, service: &Service, snapshot: &str) -> Result<Id, Failure> {
        let io = service.host().io()?;
        let mut held = self.held();
        let mut running = match held.take() {
            Some(Held::Volume(running)) => running,
            other => {
                *held = other;
                return Err(gone());
            }
        };
        let (store, snapshot) = (Arc::clone(service.store()), snapshot.to_owned());
        let (running, taken) = run_alone(io, |io| async move {
            let volume = Arc::clone(&running.volume);
            let taken = store.snapshot_volume(&io, &mut running.attachment, &volume, &snapshot).await;
            (running, taken)
        });
        *held = Some(Held::Volume(running));
        Ok(taken?)
    }

    /// Reads bytes of a volume as its guest does.
    pub fn read(&self, service: &Service, start: u64, length: u64) -> Result<Vec<u8>, Failure> {
        match &*self.held() {
            Some(Held::Volume(running)) => running.read(service, start, length),
            _ => Err(gone()),
        }
    }

    /// Opens what lies below a volume again, as it is now: what was sealed since is read from the packs.
    pub fn reopen_base(&self, service: &Service) -> Result<(), Failure> {
        let held = self.held();
        let Some(Held::Volume(running)) = &*held else { return Ok(()) };
        let volume = Arc::clone(&running.volume);
        service.run(|store, io| async move {
            let resolver = store.resolver();
            volume.reopen_base(&HostStorage, &io, &resolver).await
        })
    }

    /// Ends the server, and gives the volume back with everything durable. It was taken out of the service before.
    pub fn detach(&self, service: &Service) -> Result<(), Failure> {
        let mut held = self.held();
        self.server.stop();
        // Its groups keep what it did.
        service.throttle().ledger().remove(self.node, || self.totals());
        match held.take() {
            Some(Held::Volume(running)) => running.close(service),
            Some(Held::Snapshot(disk, reader)) => {
                let closed = service.run(|_, io| async move { disk.close(&io).await });
                drop(reader);
                closed
            }
            None => Ok(()),
        }
    }
}

/// Changes the size of a volume that is not attached to what `plan` makes of its old one; the sizes before and after,
/// in bytes.
pub fn resize_alone(
    service: &Service,
    name: &str,
    plan: impl FnOnce(u64) -> Result<u64, Failure>,
) -> Result<(u64, u64), Failure> {
    let running = Running::open(service, name, Tuning::default())?;
    let (volume, old) = (Arc::clone(&running.volume), running.volume.geometry().size);
    let resized = plan(old).and_then(|size| {
        let volume = Arc::clone(&volume);
        service.run(|_, io| async move { volume.resize(&io, size).await })
    });
    // Also when nothing was done: a layer that is not closed has to be recovered.
    running.close(service)?;
    resized.map(|()| (old, volume.geometry().size))
}

/// The same of a volume that is not attached.
pub fn read_alone(service: &Service, name: &str, start: u64, length: u64) -> Result<Vec<u8>, Failure> {
    let running = Running::open(service, name, Tuning::default())?;
    let read = running.read(service, start, length);
    running.close(service)?;
    read
}

fn gone() -> Failure {
    Failure::new("not-found", "it was detached meanwhile")
}

/// Refuses a path that no socket can have.
pub fn check_socket(path: &Path) -> Result<(), Failure> {
    let bytes = path.as_os_str().len();
    if bytes <= SOCKET_PATH_MAX {
        return Ok(());
    }
    let text = format!(
        "{}: the path of a socket has at most {SOCKET_PATH_MAX} bytes, this one has {bytes}: name another (--socket, or \
         --sockets of the daemon)",
        path.display()
    );
    Err(Failure::new("invalid", text))
}

fn close(service: &Service, volume: &Arc<Volume<HostEngine>>) -> Result<(), Failure> {
    let volume = Arc::clone(volume);
    service.run(|_, io| async move { volume.close(&io).await })
}
