-- Delete blobs and their entries in the index.
-- KEYS: index, sizes, pins
-- ARGV: prefix of blob keys, bytes of a chunk, member...
-- requires: blob_index
for i = 3, #ARGV do delete_blob(ARGV[i]) end
