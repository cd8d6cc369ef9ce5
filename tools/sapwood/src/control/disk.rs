//! A served disk, and what can be done with it while guests use it.

use std::future::Future;
use std::path::PathBuf;
use std::sync::Arc;

use sapwood_blockdev::device::BlockDevice;
use sapwood_blockdev::io::{Io, run_alone};
use sapwood_image::info::{DiskInfo, info_of};
use sapwood_image::layer::{BaseSpec, Layer};
use sapwood_image::{Disk, ErrorKind, Format, ImageError};
use sapwood_qos::account::Accounted;
use sapwood_qos::limited::Limited;
use sapwood_vhost::Server;
use serde_json::{Value, json};

use super::jobs::Job;
use super::limits::DiskLimits;
use super::wire::{Rebase, Resize};
use crate::cli::create::probe_base;
use crate::cli::reading::BaseReading;
use crate::host::{Host, HostEngine};

/// A disk that is being served.
#[derive(Clone)]
pub struct Served {
    /// The host.
    pub host: Host,
    /// The disk,
    pub disk: Arc<Disk<HostEngine>>,
    /// what guests do with it,
    pub accounted: Arc<Accounted<Limited<Disk<HostEngine>>>>,
    /// as it was named.
    pub path: PathBuf,
    /// Who serves it.
    pub server: Arc<Server>,
    /// What its guest may do.
    pub limits: Arc<DiskLimits>,
}

impl Served {
    /// Facts about the disk as it is now.
    pub fn info(&self) -> Result<DiskInfo, ImageError> {
        info_of(&self.host.storage(), &self.path, &self.disk)
    }

    /// Refuses what cannot be done with this disk as it is opened.
    pub fn check_writable(&self) -> Result<(), ImageError> {
        if self.disk.geometry().read_only {
            return Err(self.unsupported("it is served read-only"));
        }
        Ok(())
    }

    fn unsupported(&self, detail: &str) -> ImageError {
        ImageError::new(&self.path, ErrorKind::Unsupported(detail.to_owned()))
    }

    /// The layer, for what only layers do.
    pub fn layer(&self) -> Result<Arc<Layer<HostEngine>>, ImageError> {
        self.check_writable()?;
        match &*self.disk {
            Disk::Layer(layer) => Ok(Arc::clone(layer)),
            _ => Err(self.unsupported("it is no layer: it lies over nothing")),
        }
    }

    /// Runs a task on a reactor of the calling thread.
    fn run<T: 'static, F>(&self, task: impl FnOnce(Io<HostEngine>) -> F) -> anyhow::Result<T>
    where
        F: Future<Output = Result<T, ImageError>> + 'static,
    {
        Ok(run_alone(self.host.io()?, task)?)
    }

    /// Changes the size, and tells the guest.
    pub fn resize(&self, asked: &Resize) -> anyhow::Result<Value> {
        let (old, size) = (self.disk.geometry().size, asked.size);
        if size < old && !asked.shrink {
            let detail =
                format_args!("shrinking from {old} to {size} bytes loses what lies past the new end");
            return Err(ImageError::invalid(&self.path, detail).into());
        }
        if size < old && self.disk.format() == Format::Raw {
            // What is written there meanwhile would make the file longer again.
            return Err(self.unsupported("a raw disk that is served can only grow").into());
        }
        let disk = Arc::clone(&self.disk);
        self.run(|io| async move { disk.resize(&io, size).await })?;
        self.server.config_changed();
        Ok(json!({ "old-size": old, "size": size }))
    }

    /// Copies into the layer what it reads from its bases.
    pub fn flatten(&self, job: &Arc<Job>) -> anyhow::Result<Value> {
        self.move_to(None, job)?;
        Ok(json!({}))
    }

    /// Lets the layer lie over another base.
    pub fn rebase(&self, asked: Rebase, job: &Arc<Job>) -> anyhow::Result<Value> {
        let names_only = asked.unsafe_;
        let base = self.base(asked)?;
        let layer = self.layer()?;
        if base.is_some() && layer.info().base.is_none() {
            // What it does not hold is not told from what is zero there.
            let detail = "it has no base: only a layer that nobody uses can get its first one";
            return Err(self.unsupported(detail).into());
        }
        let over = match &base {
            Some(base) => json!({ "base": base.path, "format": base.format.name() }),
            None => json!({ "base": null }),
        };
        if !names_only {
            self.move_to(base, job)?;
            return Ok(over);
        }
        let storage = self.host.storage();
        let change = self.run(|io| async move { layer.repoint(&storage, &io, base.as_ref()).await })?;
        let mut said = over;
        said["change"] = json!(change);
        Ok(said)
    }

    /// Merges the layer into its base.
    pub fn commit(&self, job: &Arc<Job>) -> anyhow::Result<Value> {
        let (layer, storage, job) = (self.layer()?, self.host.storage(), Arc::clone(job));
        let committed = self.run(|io| async move {
            let mut report = |done, total| job.report(done, total);
            layer.commit_online(&storage, &io, &mut report).await
        })?;
        Ok(json!({ "base": committed.base, "written-bytes": committed.written }))
    }

    fn base(&self, asked: Rebase) -> anyhow::Result<Option<BaseSpec>> {
        let Some(path) = asked.base else { return Ok(None) };
        let read = |name: Option<String>| match name {
            Some(name) => {
                let format = name.parse::<Format>();
                format.map(Some).map_err(|error| ImageError::invalid(&path, format_args!("{error}")))
            }
            None => Ok(None),
        };
        let (format, chain_format) = (read(asked.format)?, read(asked.chain_format)?);
        let format = match format {
            Some(format) => format,
            None => probe_base(&self.host, &self.path, &path)?,
        };
        let reading =
            BaseReading { snapshot: asked.snapshot, allow_backing: asked.allow_backing, chain_format };
        Ok(Some(reading.base(path, format)?))
    }

    fn move_to(&self, base: Option<BaseSpec>, job: &Arc<Job>) -> anyhow::Result<()> {
        let (layer, storage, job) = (self.layer()?, self.host.storage(), Arc::clone(job));
        self.run(|io| async move {
            let mut report = |done, total| job.report(done, total);
            layer.rebase(&storage, &io, base.as_ref(), &mut report).await
        })
    }
}
