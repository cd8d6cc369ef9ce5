//! A layer whose base was sealed while it is open.

use std::sync::Arc;

use super::base::Below;
use super::device::Layer;
use crate::below::Chain;
use crate::error::{ErrorKind, ImageError};
use crate::sealed::{Packs, Root};
use sapwood_blockdev::engine::Engine;

impl<E: Engine> Layer<E> {
    /// Reads what lies below from a sealed snapshot from now on, which must be the same disk. Reads that are under way end with
    /// what lay there before, so its files must stay for them. The base record stays as it is, and leads to those files when
    /// the layer is opened again: no resolver answers with a sealed snapshot yet.
    ///
    /// # Errors
    /// When the layer has no base, or one of another size; when there can be no such snapshot.
    pub fn base_was_sealed(&self, packs: &Arc<Packs<E>>, root: Root) -> Result<(), ImageError> {
        let below = self.below();
        let refuse = |detail: String| Err(ImageError::new(self.path(), ErrorKind::Base(detail)));
        let Some(size) = below.record.base.as_ref().map(|base| base.identity.size()) else {
            return refuse("it has no base that could have been sealed".to_owned());
        };
        if size != root.size {
            return refuse(format!("its base has {size} bytes, and the sealed snapshot {}", root.size));
        }
        let chain = Some(Arc::new(Chain::open_sealed(packs, root)?));
        self.set_below(Arc::new(Below::over(below.record.clone(), chain)));
        Ok(())
    }
}
