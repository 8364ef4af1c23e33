-- Let the owner of a file see it: it is complete.
-- KEYS: index of files by expiry, hash of sizes
-- ARGV: prefix of files, file, what it is as JSON, time of creation, expiry, both in unix seconds
-- Returns 1, or 0 if there is no such file.
-- requires: file_space
local owner = redis.call('HGET', FILE .. ARGV[2], 'owner')
if not owner then return 0 end
redis.call('HSET', FILE .. ARGV[2], 'about', ARGV[3])
redis.call('ZADD', FILES, ARGV[5], ARGV[2])
redis.call('ZADD', FILES .. ':of:' .. owner, ARGV[4], ARGV[2])
return 1
