-- Append to a file that is being uploaded, if it has so many bytes now: a repeated call changes nothing.
-- KEYS: index of files by expiry, hash of sizes
-- ARGV: prefix of files, file, owner, expiry in unix seconds, budget, share of an owner, bytes written before, piece
-- Returns -1, or the bytes that files take, if there is no room.
-- requires: file_space
if tonumber(redis.call('HGET', FILE .. ARGV[2], 'size') or 0) > tonumber(ARGV[7]) then return -1 end
local budget, share = tonumber(ARGV[5]), tonumber(ARGV[6])
return append_file(ARGV[2], ARGV[3], ARGV[4], budget, share, {ARGV[8]}) or -1
