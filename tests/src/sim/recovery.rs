//! How a history ends a process and starts the next.

use std::sync::Arc;

use sapwood_blockdev::device::{BlockDevice, DeviceError};
use sapwood_blockdev::io::Io;

use super::contract::BLOCK_SECTORS;
use super::engine::SimEngine;
use super::faults::Faults;
use super::history::{History, Outcome, Stop};
use super::persist::Persistence;
use super::register::Crash;
use super::session::{Session, Worker};
use super::storage::SimStorage;
use super::subject::{Control, Disk, OpenError, Subject, Task, disk_path};
use super::world::ProcessId;

/// Attempts to open after which a lock counts as never released.
const ATTEMPTS_MAX: u32 = 500;
/// Attempts to open after which the storage stops failing.
const FAULTY_ATTEMPTS_MAX: u32 = 4;

impl<S: Subject> History<S> {
    pub(super) fn create(&mut self) -> Outcome {
        let process = self.world.process();
        let worker = Worker::new(&self.world, process);
        let task = self.subject.create(self.world.storage(process), worker.io.clone(), self.shape);
        let made = self.complete(&worker, task)?;
        worker.io.abandon_tasks();
        self.world.kill(process);
        self.contract.stopped();
        made.map_err(|error| Stop::Violation(format!("cannot create: {error}")))
    }

    /// Ends the process or the power; then, perhaps after a check, a new process recovers.
    pub(super) fn crash(&mut self, power: Option<Persistence>, check: bool) -> Outcome {
        self.fall(power);
        if check || self.luck.percent(30) {
            self.check()?;
        }
        self.start()
    }

    fn fall(&mut self, power: Option<Persistence>) {
        self.lose_snapshots(power.is_some());
        if let Some(session) = self.session.take() {
            if session.sync_failed() {
                self.contract.storage_dropped_data();
            }
            if power.is_none() {
                self.world.kill(session.process);
            }
            session.abandon();
        }
        if let Some(mode) = power {
            self.world.power_cut(mode);
        }
        self.orders.clear();
        self.contract.crashed(if power.is_some() { Crash::Power } else { Crash::Kill });
    }

    /// Opens the disk and looks at all of it. Opening may fail as long as the storage does.
    pub(super) fn start(&mut self) -> Outcome {
        let faulty = self.luck.percent(20);
        self.world.set_faults(if faulty { self.faults.clone() } else { Faults::benign() });
        for attempt in 0..ATTEMPTS_MAX {
            let before = self.world.failures();
            match self.open()? {
                Ok(()) => return self.inspect(),
                Err(OpenError::Failed(error)) if self.world.failures() == before => {
                    return Err(Stop::Violation(format!("cannot open: {error}")));
                }
                Err(_) => {}
            }
            if self.world.failures().1 != before.1 {
                self.contract.storage_dropped_data();
                self.contract.crashed(Crash::Kill);
            }
            if attempt == FAULTY_ATTEMPTS_MAX {
                self.world.set_faults(Faults::benign());
                self.world.make_room();
            }
            self.event()?;
        }
        Err(Stop::Violation("the lock is never released".to_owned()))
    }

    /// One attempt to open.
    fn open(&mut self) -> Outcome<Result<(), OpenError>> {
        let shape = self.shape;
        let open = |subject: &S, storage, io| subject.open(storage, io, shape);
        let (opened, process, worker) = self.in_new_process(open)?;
        self.world.note(|| format!("opened: {:?}", opened.as_ref().err()));
        match opened {
            Ok(disk) => {
                self.session = Some(Session::start(&self.world, process, disk, worker, shape.queues));
                Ok(Ok(()))
            }
            Err(error) => {
                worker.io.abandon_tasks();
                self.world.kill(process);
                Ok(Err(error))
            }
        }
    }

    /// Runs a task in a process made for it, which dies with it when the history is cut.
    pub(super) fn in_new_process<T: 'static>(
        &mut self,
        task: impl FnOnce(&S, SimStorage, Io<SimEngine>) -> Task<T>,
    ) -> Outcome<(T, ProcessId, Worker)> {
        let process = self.world.process();
        let worker = Worker::new(&self.world, process);
        let task = task(&self.subject, self.world.storage(process), worker.io.clone());
        match self.complete(&worker, task) {
            Ok(value) => Ok((value, process, worker)),
            Err(stop) => {
                worker.io.abandon_tasks();
                self.world.kill(process);
                Err(stop)
            }
        }
    }

    /// Reads the whole disk after a recovery and compares.
    fn inspect(&mut self) -> Outcome {
        self.world.set_faults(Faults::benign());
        let write_cache = self.shape.write_cache;
        self.session().disk.set_write_cache(write_cache);
        self.contract.set_write_cache(write_cache);
        match self.read_all()? {
            Ok(data) => self.contract.recovered(&data)?,
            Err((sector, error)) => {
                return Err(Stop::Violation(format!("cannot read sector {sector} after recovery: {error}")));
            }
        }
        self.world.set_faults(self.faults.clone());
        Ok(())
    }

    /// Reads the whole disk, or up to the first sector that cannot be read.
    fn read_all(&mut self) -> Outcome<Result<Vec<u8>, (u64, DeviceError)>> {
        let sectors = self.session().sectors();
        let chunk = self.luck.between(1, 8 * BLOCK_SECTORS);
        let mut data = Vec::new();
        for first in (0..sectors).step_by(chunk as usize) {
            let queue = self.luck.below(self.shape.queues as u64) as usize;
            let buf = self.session().peek(queue, first, chunk.min(sectors - first));
            self.wait_for("a read after recovery", |history| history.session().peeked.is_some())?;
            if let Some(Err(error)) = self.session().peeked.take() {
                return Ok(Err((first, error)));
            }
            let start = data.len();
            data.resize(start + buf.len(), 0);
            buf.read_at(0, &mut data[start..]);
        }
        Ok(Ok(data))
    }

    /// A clean stop; when the storage fails it may turn into a kill.
    pub(super) fn stop(&mut self) -> Outcome {
        self.drain()?;
        let world = self.world.clone();
        let session = self.session();
        let close = Arc::clone(&session.disk);
        let storage = world.storage(session.process);
        let task = Disk::control(close, storage, session.owner.io.clone(), Control::Close);
        let closed = session.owner.give(&world, task);
        self.wait_for("the clean stop", |_| closed.borrow().is_some())?;
        let result = closed.take().expect("a result");
        self.world.note(|| format!("stopped: {result:?}"));
        match result {
            Err(_) if self.session().storage_failed() => self.fall(None),
            Err(error) => return Err(Stop::Violation(format!("cannot stop: {error}"))),
            Ok(()) => {
                let session = self.session.take().expect("a session");
                self.contract.stopped();
                let process = session.process;
                session.abandon();
                self.world.retire(process);
            }
        }
        Ok(())
    }

    pub(super) fn reopen(&mut self) -> Outcome {
        self.stop()?;
        self.check()?;
        self.start()
    }

    /// Looks for damage in the files as they lie there.
    pub(super) fn check(&mut self) -> Outcome {
        self.world.set_faults(Faults::benign());
        let check = |subject: &S, storage, io| subject.check(storage, io);
        let (result, process, worker) = self.in_new_process(check)?;
        worker.io.abandon_tasks();
        self.world.kill(process);
        match result {
            Ok(errors) if errors.is_empty() => self.check_snapshots(),
            Ok(errors) => Err(Stop::Violation(format!("the check found {errors:?}"))),
            Err(OpenError::Locked | OpenError::Unfinished) => Ok(()),
            Err(OpenError::Failed(error)) => Err(Stop::Violation(format!("cannot check: {error}"))),
        }
    }

    /// The sector that says where everything is goes bad; another one must lead to the same state.
    pub(super) fn damage_slot(&mut self, power: Option<Persistence>) -> Outcome {
        self.fall(power);
        while self.event()? {}
        self.world.set_faults(Faults::benign());
        let Some(sector) = self.spare_sector()? else { return self.start() };
        self.world.damage(&disk_path(), sector);
        self.world.make_room();
        match self.open()? {
            Ok(()) => self.inspect(),
            Err(error) => Err(Stop::Violation(format!("cannot open after losing a slot: {error:?}"))),
        }
    }

    /// The same after a start and nothing else, and a block of the disk's own goes bad, too. When
    /// the disk refuses that, or says of a part that it is damaged, both are mended.
    pub(super) fn damage_log(&mut self, choice: u64) -> Outcome {
        self.crash(None, false)?;
        self.fall(None);
        while self.event()? {}
        self.world.set_faults(Faults::benign());
        let (Some(slot), Some((block, _))) = (self.spare_sector()?, self.own_block(choice)) else {
            return self.start();
        };
        if block <= 2 {
            return self.start();
        }
        let damage = |sector| self.world.damage(&disk_path(), sector).expect("the disk's file");
        let (slot, log) = (damage(slot), damage(block * BLOCK_SECTORS));
        let opened = self.open()?.is_ok();
        let whole = opened && self.read_all()?.map_or_else(|(_, e)| e != DeviceError::Corrupt, |_| true);
        let refused = !whole;
        if whole {
            self.inspect()?;
        } else if opened {
            self.fall(None);
            while self.event()? {}
            self.world.set_faults(Faults::benign());
        }
        self.world.mend(&log);
        if refused {
            self.world.mend(&slot);
            self.start()?;
        }
        Ok(())
    }

    fn spare_sector(&mut self) -> Outcome<Option<u64>> {
        let find = |subject: &S, storage, io| subject.spare_sector(storage, io);
        let (sector, process, worker) = self.in_new_process(find)?;
        worker.io.abandon_tasks();
        self.world.kill(process);
        Ok(sector)
    }
}
