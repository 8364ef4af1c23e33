-- Delete a file, and all that are over.
-- KEYS: index of files by expiry, hash of sizes
-- ARGV: prefix of files, file (empty: only those that are over)
-- requires: file_space
sweep_files()
if redis.call('EXISTS', FILE .. ARGV[2]) == 1 then remove_file(ARGV[2]) end
