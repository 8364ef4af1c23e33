-- Keep the result of a line, once: append it to the output or to the errors, and count it.
-- KEYS: index of files by expiry, hash of sizes, batch, its lease, its bitmap of lines
-- ARGV: prefix of files, file, owner, expiry of the file, budget, share of an owner, gateway that must hold the lease,
-- number of the line, field that counts it (completed, failed or expired), piece...
-- Returns -1, -2 if the lease is another's, or the bytes that files take, if there is no room.
-- requires: file_space
if redis.call('GET', KEYS[4]) ~= ARGV[7] then return -2 end
if redis.call('GETBIT', KEYS[5], ARGV[8]) == 1 then return -1 end
local pieces = {}
for i = 10, #ARGV do pieces[i - 9] = ARGV[i] end
local taken = append_file(ARGV[2], ARGV[3], ARGV[4], tonumber(ARGV[5]), tonumber(ARGV[6]), pieces)
if taken then return taken end
redis.call('SETBIT', KEYS[5], ARGV[8], 1)
redis.call('HINCRBY', KEYS[3], ARGV[9], 1)
return -1
