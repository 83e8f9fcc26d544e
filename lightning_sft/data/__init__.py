"""The data path: row -> messages -> ids and weights -> packs -> plan of the epoch -> Batch. One file a stage."""
